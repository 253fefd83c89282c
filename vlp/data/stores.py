"""What is asked of object stores, by address and through fsspec: lists, objects, each in several
tries, with errors that say what to do.

An address here is bare: `s3://bucket/train/00000.tar`, without credentials, signature and query.
What opens it is kept apart (`bare`, `use`) and stands in no message, note or mark.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from vlp.data.asking import in_words, is_full, is_refused, status_of, tried
from vlp.privacy import address, remember, scrubbed

# Stores that show an object only when all of it is there.
_AT_ONCE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf")
_AZURE = ("abfs", "abfss", "az")
HTTP = ("http", "https")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a", *HTTP), "'vlp[remote]'"),
    **dict.fromkeys(("gs", "gcs"), "'vlp[gs]'"),
    **dict.fromkeys(_AZURE, "'vlp[azure]'"),
}
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")

Info = dict[str, Any]  # what a store says of an object: size, version, …
_Result = TypeVar("_Result")

options: dict[str, dict[str, Any]] = {}  # of fsspec, by scheme; "": of all but http
# Whole addresses by bare ones, and one of its files by that of each folder.
signed: dict[str, str] = {}
_listed: dict[str, dict[str, Info]] = {}  # what a store said of a folder's entries, by address


# ---- addresses and what opens them


def is_address(text: str) -> bool:
    """Whether a text is an address rather than a path of this machine."""
    return _SCHEME.match(text) is not None


def scheme_of(place: str) -> str:
    """s3 of s3://…"""
    return place.partition(":")[0]


def is_top(place: str) -> bool:
    """Whether an address is that of a bucket or repository, above which nothing can be listed."""
    scheme, *parts = place.replace("://", "/").split("/")
    if scheme != "hf":
        return len(parts) <= 1
    return len(parts) <= (3 if parts[0] in ("datasets", "spaces") else 2)


def checked_scheme(text: str) -> str:
    """The scheme of an address that can be used here; raises ValueError for another."""
    import fsspec

    scheme = scheme_of(text)
    if scheme == "memory":
        raise ValueError(
            f"{address(text)}: each process has a memory of its own, and all of it is gone when "
            "the call ends; name a folder"
        )
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"pip install {package}" if package else str(error)
        raise ValueError(f"{address(text)}: {scheme}:// needs another package: {advice}") from None
    except ValueError:
        raise ValueError(
            f"{address(text)}: no store is known by {scheme}://; expected a folder, or an address "
            "of s3://, gs://, abfs://, hf:// or https://"
        ) from None
    return scheme


def bare(text: str) -> str:
    """The address without what opens it, which is remembered."""
    # Elsewhere than in http a ? may be that of a pattern.
    beginning = r"[?#]" if scheme_of(text) in HTTP else r"\?(?=[^/]*=)"
    place = re.split(beginning, address(text))[0].rstrip("/")
    if place != text.rstrip("/"):
        signed[place] = signed[folder_of(place)] = text
    return place


def folder_of(place: str) -> str:
    """The address of the folder that a file lies in."""
    return place.rpartition("/")[0]


def use(further: Mapping[str, Mapping[str, Any]]) -> None:
    """Let these options of fsspec, by scheme ("": all but http), hold from now on in this process
    and in those that it sends paths to.
    """
    for scheme, of_scheme in further.items():
        remember(dict(of_scheme), "storage")
        # Before gcsfs is imported: it would ask any server by gRPC and TLS what kind of bucket this
        # is, and one that stands in for Google's never answers.
        if scheme in ("", "gs", "gcs") and "endpoint_url" in of_scheme:
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        options[scheme] = {**options.get(scheme, {}), **of_scheme}


def options_of(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the options --storage say: KEY=VALUE, or SCHEME:KEY=VALUE; dots lead into an option."""
    import yaml

    chosen: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        scheme, colon, name = key.rpartition(":")
        if not (equals and name) or (colon and not scheme):
            # Without its value, which may be a secret; without = the whole may be one.
            shown = f"--storage {key}" if equals else "--storage without ="
            raise ValueError(
                f"{shown}: expected KEY=VALUE or SCHEME:KEY=VALUE, such as "
                "endpoint_url=http://localhost:9000 or s3:anon=true"
            )
        place = chosen.setdefault(scheme, {})
        *outer, last = name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            place[last] = text
    return chosen


def options_for(place: str) -> dict[str, Any]:
    """The options of fsspec for an address."""
    scheme = scheme_of(place)
    everywhere = {} if scheme in HTTP else options.get("", {})
    return {**everywhere, **options.get(scheme, {})}


def whole(place: str) -> str:
    """The address with what opens it."""
    if place in signed:
        return signed[place]

    # What opens another file of the folder may open this one, too.
    sibling = signed.get(folder_of(place))
    if sibling is None:
        return place
    beside, question, query = sibling.partition("?")
    return f"{folder_of(beside)}/{place.rpartition('/')[2]}{question}{query}"


def _file_system(place: str) -> tuple[Any, str]:
    """(fsspec's file system, the name of the address in it)."""
    import fsspec

    return fsspec.url_to_fs(whole(place), **options_for(place))


# ---- several tries


def _tried(work: Callable[[], _Result], verb: str, place: str) -> _Result:
    """What `work` returns, which asks a store about an address; raises OSError after several tries,
    and at once where trying again changes nothing.
    """
    goes_on = "What is finished stays, and the same command goes on"

    def told(error: Exception, n_tries: int) -> str:
        hint = "; the disk of this machine is full" if is_full(error) else ""
        return f"{place} cannot be {verb} ({n_tries} tries: {_told(error)}{hint}). {goes_on}"

    try:
        return tried(work, lambda error: _is_final(error, place), told)
    except FileNotFoundError:
        raise
    except NotImplementedError as error:
        raise OSError(f"{place} cannot be {verb}: its store cannot ({_told(error)})") from error
    except Exception as error:
        if _is_denied(error):
            raise PermissionError(
                f"the store does not let {place} be {verb} ({_told(error)}); look at the "
                f"credentials: they may have ended, or lack the right. {goes_on}"
            ) from error
        if _is_of_credentials(error):
            raise OSError(told(error, 1)) from error
        raise


def _is_final(error: Exception, place: str) -> bool:
    """Whether trying again changes nothing."""
    # fsspec's http says of errors of a moment, too, that there is no such file.
    if isinstance(error, FileNotFoundError):
        return is_refused(error, place)
    is_final = isinstance(error, NotImplementedError) or _is_of_credentials(error)
    return is_final or _is_denied(error)


def _is_denied(error: Exception) -> bool:
    """Whether the store knows who asks, and does not let it, or no longer knows."""
    if isinstance(error, PermissionError) or status_of(error) in (401, 403):
        return True
    # What google.auth, which fetches new ones itself, and azure raise without a status.
    return type(error).__name__ in ("RefreshError", "ClientAuthenticationError")


def _is_of_credentials(error: Exception) -> bool:
    """Whether there are no credentials, or only a part of them: no try brings others."""
    return "Credential" in type(error).__name__


def _told(error: Exception) -> str:
    return scrubbed(in_words(error))[:300]


# ---- objects


def put(local: Path, place: str) -> None:
    """Put a local file at an address, whole or not at all; raises OSError."""

    def once() -> None:
        file_system, name = _file_system(place)
        if scheme_of(place) in _AT_ONCE:
            # adlfs alone refuses to replace unless told so (0.x `_put_file`).
            replacing = {"overwrite": True} if scheme_of(place) in _AZURE else {}
            file_system.put_file(str(local), name, **replacing)
            return

        # A reader must not meet a part.
        folder, _, last = name.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid4().hex[:12]}.tmp"
        file_system.makedirs(folder, exist_ok=True)
        try:
            file_system.put_file(str(local), temporary)
            file_system.mv(temporary, name)
        except Exception:
            with contextlib.suppress(Exception):
                file_system.rm_file(temporary)
            raise

    try:
        _tried(once, "written", place)
    except FileNotFoundError as error:
        raise OSError(
            f"{place} cannot be written: there is no such bucket or repository ({_told(error)})"
        ) from None
    listed = _listed.get(folder_of(place))
    if listed is not None:
        listed[place] = {"size": local.stat().st_size, "type": "file"}


def fetch(place: str, local: Path, size: int | None = None, *, partly: bool = False) -> None:
    """Fetch a small file, whole or not at all; raises FileNotFoundError where there is none.

    size: its bytes, where they are known. partly: it has more, of which no more are fetched.
    """
    temporary = local.with_name(f".{local.name}.{uuid4().hex[:12]}.tmp")

    def once() -> None:
        file_system, name = _file_system(place)
        if partly:
            temporary.write_bytes(file_system.cat_file(name, start=0, end=size))
        else:
            file_system.get_file(name, str(temporary))

        # A connection that breaks off may end like a file.
        known = _listed.get(folder_of(place), {}).get(place)
        expected = size if known is None or size is not None else known["size"]
        n_bytes = temporary.stat().st_size
        if expected is not None and n_bytes != expected:
            look_again(folder_of(place))
            raise OSError(f"{n_bytes} of {expected} bytes came")

    try:
        _tried(once, "read", place)
        temporary.replace(local)
    finally:
        temporary.unlink(missing_ok=True)


def part(place: str, start: int, stop: int) -> bytes:
    """The bytes of a file from start to below stop; raises OSError."""

    def once() -> bytes:
        file_system, name = _file_system(place)
        data: bytes = file_system.cat_file(name, start=start, end=stop)

        # Some http servers know no ranges, and send all.
        if len(data) > stop - start:
            data = data[start:stop]
        if len(data) < stop - start:
            look_again(folder_of(place))
            raise OSError(f"{len(data)} of {stop - start} bytes came")
        return data

    return _tried(once, "read", place)


def remove(place: str) -> None:
    """Remove a file, if it is there."""
    # The Hub refuses to remove what is not.
    if info(place) is None:
        return

    def once() -> None:
        file_system, name = _file_system(place)
        file_system.rm_file(name)

    with contextlib.suppress(FileNotFoundError):
        _tried(once, "removed", place)
    _listed.get(folder_of(place), {}).pop(place, None)


# ---- what there is


def look_again(*folders: str) -> None:
    """Forget what is known of the entries of these folders, and of those below."""
    for folder in folders:
        for listed in list(_listed):
            if listed == folder or listed.startswith(f"{folder}/"):
                _listed.pop(listed, None)  # another thread may have, too


def look_again_everywhere() -> None:
    """Forget what is known of the entries of all folders."""
    _listed.clear()


def info(place: str) -> Info | None:
    """What the store says of a file; None where there is none."""
    if scheme_of(place) in HTTP:
        return _asked(place)
    if is_top(place):
        return None
    try:
        known = entries(folder_of(place)).get(place)
    # The right to read files need not be a right to list them.
    except PermissionError:
        return _asked(place)
    return None if is_folder(known) else known


def is_folder(known: Info | None) -> bool:
    """Whether this is what a list says of a folder."""
    return known is not None and known.get("type") == "directory"


def entries(folder: str) -> dict[str, Info]:
    """What the store says of the files and folders of a folder, by address; asked once."""
    # Once, because another thread may forget it meanwhile.
    known = _listed.get(folder)
    if known is None:
        known = _listing(folder, lambda system, name: system.ls(name, detail=True))
        _listed[folder] = known
    return known


def below(folder: str) -> dict[str, Info]:
    """What the store says now of all files below a folder, by address."""
    return _listing(folder, lambda system, name: system.find(name, detail=True).values())


def _asked(place: str) -> Info | None:
    """What a store without lists says of a file, asked once."""
    known = _listed.setdefault(folder_of(place), {})
    if place in known:
        return known[place] or None

    def once() -> Info:
        file_system, name = _file_system(place)
        try:
            about: Info = file_system.info(name)
        except FileNotFoundError as error:
            if is_refused(error, place):
                return {}
            raise
        if about.get("size") is None:
            raise OSError("the server does not tell its size")
        return about

    known[place] = _tried(once, "read", place)
    return known[place] or None


def _listing(folder: str, listed: Callable[[Any, str], Iterable[Info]]) -> dict[str, Info]:
    """What a store lists, by address; nothing where there is no such folder."""

    def once() -> dict[str, Info]:
        file_system, name = _file_system(folder)
        # This process may have listed it before another wrote there.
        file_system.invalidate_cache()
        try:
            listing = list(listed(file_system, name))
        except (FileNotFoundError, NotADirectoryError):
            return {}

        # A list of a file is the file itself.
        start = file_system._strip_protocol(folder).rstrip("/") + "/"
        named = {entry["name"].rstrip("/"): entry for entry in listing}
        return {
            f"{folder}/{name.removeprefix(start)}": entry
            for name, entry in named.items()
            if name.startswith(start)
        }

    return _tried(once, "listed", folder)
