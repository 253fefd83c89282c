"""Paths whose files lie in a store: `s3://bucket/train/00000.tar`, any address that fsspec knows.

A `StoredPath` is a `pathlib.Path`, so that whoever reads and writes files need not know where they
lie. Where the system asks for its name (`open`, `np.load`, `mmap`), it gets that of a local copy:

    of a source         one in the bounded cache of remote files, fetched whole when first opened
    below a destination one in a scratch folder of this call, fetched when first opened. A file that
                        `vlp.files.replacing` has written is in the store as soon as it has its name

So a file of a destination appears whole or not at all: stores put an object at once, and where one
does not, it is put under a temporary name that is then moved. `exists` goes by a list of the folder
that is read once (`look_again` reads it anew).

Signatures, credentials and options stand in no path: they are kept apart, by address, and travel
with a path to other processes of the same call.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import fnmatch
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import Any, TypeVar
from uuid import uuid4

from vlp import caches
from vlp.caches import cache_folder
from vlp.files import write_atomically
from vlp.privacy import address, remember, scrubbed

# Stores that show an object only when all of it is there.
_AT_ONCE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "hf")
_HTTP = ("http", "https")
_PACKAGES = {"s3": "'vlp[remote]'", "s3a": "'vlp[remote]'", "http": "'vlp[remote]'",
             "https": "'vlp[remote]'", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs",
             "abfss": "adlfs", "az": "adlfs"}  # fmt: skip
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
_TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubled before each further one
_AT_THE_SAME_TIME = 32  # small files that are fetched
_DROPPED = (".tar", ".safetensors")  # local copies that go once the store has the file
SENT_EVERY_S = 60.0  # what a kill can cost of a file that grows in place
CACHE_BYTES = 50 * 10**9  # of copies of sources
_BUCKET = 2  # parts of the address of a bucket: s3://NAME
_LAST = 1 << 62  # above any version's number

_Result = TypeVar("_Result")

_options: dict[str, dict[str, Any]] = {}  # of fsspec, by scheme; "": of all but http
# Whole addresses by those without their queries, and one of its files by that of each folder.
_signed: dict[str, str] = {}
_scratch: dict[str, Path] = {}  # the scratch folder of each destination
_growing: dict[StoredPath, float] = {}  # files that grow, and when each was last put
_listed: dict[str, dict[str, dict[str, Any]]] = {}  # what a store said of a folder's files


class StoredPath(PosixPath):
    """A file or a folder in a store."""

    def __str__(self) -> str:
        scheme, rest = self.parts[:1], self.parts[1:]
        return f"{''.join(scheme)}//{'/'.join(rest)}"

    def __repr__(self) -> str:
        return f"StoredPath({str(self)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        root = _root_of(self)
        scratch = (root, _scratch[root]) if root is not None else None
        signed = _signed.get(str(self))
        return _rebuilt, (str(self), signed, scratch, _options)

    def __fspath__(self) -> str:
        """The name of a local copy; raises OSError where a source cannot be fetched."""
        root = _root_of(self)
        if root is None:
            return self._of_source()

        # What is not in the store yet is about to be written.
        local = _local(root, self)
        if not local.exists() and not _is_temporary(self):
            _bring(self, local)
        local.parent.mkdir(parents=True, exist_ok=True)
        return str(local)

    def _of_source(self) -> str:
        from vlp.data.fetch import Cache

        if _is_temporary(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        info = _info(self)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        url = _url(self)
        cache = Cache(CACHE_BYTES, _of_scheme(self), {address(url): _version(info)})
        if url not in _compared:
            cache.drop_if_changed(url, int(info["size"]), _version(info))
            _compared.add(url)
        return cache.get(url)

    # ---- what is there

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        root = _root_of(self)
        if root is not None and _local(root, self).is_file():
            return True
        return _info(self) is not None

    def is_dir(self, **_: Any) -> bool:
        root = _root_of(self)
        if root is not None and _local(root, self).is_dir():
            return True
        if _scheme(self) in _HTTP:
            return False
        # By the list of the folder above, which answers for all that is in it; a bucket has none.
        if len(self.parts) > _BUCKET:
            with contextlib.suppress(PermissionError):
                return _is_folder(_entries(self.parent).get(str(self)))
        return bool(_entries(self))

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size, and a time of change that is a number of the file's version; raises OSError."""
        root = _root_of(self)
        if root is not None and _local(root, self).exists():
            return os.stat(_local(root, self))

        info = _info(self)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        digest = hashlib.sha256(_version(info).encode()).digest()
        version_ns = int.from_bytes(digest[:8], "big") % _LAST
        fields = [stat.S_IFREG | 0o644, 0, 0, 1, 0, 0, int(info["size"]), 0, 0, 0]
        times = {"st_mtime_ns": version_ns, "st_ctime_ns": 0, "st_atime_ns": 0}
        return os.stat_result(fields, times)

    def glob(self, pattern: str, **_: Any) -> Iterator[StoredPath]:  # type: ignore[override]
        """The files of this folder alone whose names fit; the folder is listed anew."""
        look_again(self)
        files = [url for url, info in _entries(self).items() if not _is_folder(info)]
        return _fitting(files, pattern)

    def rglob(self, pattern: str, **_: Any) -> Iterator[StoredPath]:  # type: ignore[override]
        """The files below this folder whose names fit; all is listed anew."""
        return _fitting(_found_below(self), pattern)

    def iterdir(self) -> Iterator[StoredPath]:  # type: ignore[override]
        """Files and folders of this folder."""
        return map(StoredPath, sorted(_entries(self)))

    # ---- what changes

    def mkdir(self, *_: Any, **__: Any) -> None:
        """Nothing: stores have names only, no folders."""

    def rmdir(self) -> None:
        """Nothing, as `mkdir`."""

    def unlink(self, missing_ok: bool = False) -> None:
        root = _root_of(self)
        if root is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        _local(root, self).unlink(missing_ok=True)
        if not _is_temporary(self):
            _removed(self)

    def replace(self, target: Any) -> StoredPath:
        """Give a file of the scratch folder its name: in the store first, and then here."""
        assert isinstance(target, StoredPath)
        root = _root_of(target)
        assert root is not None  # a source cannot have been written

        # A mark must not be there before what it vouches for.
        _publish_growing(root)
        temporary, local = _local(root, self), _local(root, target)
        put(temporary, target)
        # Large ones are not read again by the call that writes them.
        if target.suffix in _DROPPED:
            temporary.unlink()
        else:
            os.replace(temporary, local)
        return target

    # ---- its name

    def absolute(self) -> StoredPath:
        return self

    def resolve(self, strict: bool = False) -> StoredPath:
        return self

    def expanduser(self) -> StoredPath:
        return self

    def is_absolute(self) -> bool:
        return True


def _rebuilt(
    url: str,
    signed: str | None,
    scratch: tuple[str, Path] | None,
    options: dict[str, dict[str, Any]],
) -> StoredPath:
    """A path that another process of the same call has sent."""
    if signed is not None:
        _signed[url] = signed
    if scratch is not None and scratch[0] not in _scratch:
        _scratch[scratch[0]] = scratch[1]
        caches.hold(scratch[1])
    for scheme, of_scheme in options.items():
        if scheme not in _options:
            use({scheme: of_scheme})
    return StoredPath(url)


# ---- what users write


def is_address(text: str | Path) -> bool:
    """Whether a text is an address rather than a path of this machine."""
    return isinstance(text, StoredPath) or _SCHEME.match(str(text)) is not None


def source(text: str | Path) -> Path:
    """A file or folder to read from; raises ValueError for an address of a kind that cannot be."""
    if isinstance(text, Path):
        return text
    if not is_address(text):
        return Path(text).expanduser()
    scheme = _checked_scheme(text)
    if scheme == "file":
        return Path(text.removeprefix("file://"))

    # A signature is kept apart, and the rest names the file.
    bare = re.split(r"[?#]", address(text))[0].rstrip("/")
    path = StoredPath(bare)
    if bare != text.rstrip("/"):
        _signed[bare] = _signed[str(path.parent)] = text
    return path


def destination(text: str | Path, *, is_file: bool = False) -> Path:
    """A folder to write into, or a file; raises ValueError for an address that cannot be written
    to.
    """
    path = source(text)
    if not isinstance(path, StoredPath):
        return path if isinstance(text, Path) or is_address(text) else Path(text)
    if _scheme(path) in _HTTP:
        raise ValueError(
            f"{path}: http can be read from, but not written to; name a folder of this machine, or "
            "an address of s3://, gs://, abfs:// or hf://"
        )
    if len(path.parts) <= _BUCKET:
        raise ValueError(f"{path} is a whole bucket; name a folder in it: {path}/NAME")

    root = str(path.parent if is_file else path)
    if root not in _scratch:
        _scratch[root] = _new_scratch()
    return path


def destination_file(text: str) -> Path:
    """A file to write, for the options that name one."""
    try:
        return destination(text, is_file=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_writable(path: StoredPath) -> None:
    """Raise OSError where nothing could be written beside `path`; leaves nothing behind."""
    probe = path.with_name(f".{path.name}.{uuid4().hex[:12]}.probe")
    write_atomically(probe, b"probe")
    probe.unlink()


def _checked_scheme(text: str) -> str:
    """The scheme of an address that can be used here."""
    import fsspec

    match = _SCHEME.match(text)
    assert match is not None
    scheme = match[1]
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


def use(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Let these options of fsspec, by scheme ("": all but http), hold from now on in this process
    and in those that it sends paths to.
    """
    for scheme, of_scheme in options.items():
        remember(dict(of_scheme), "storage")
        _options[scheme] = {**_options.get(scheme, {}), **of_scheme}


def options_of(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the options --storage say: KEY=VALUE, or SCHEME:KEY=VALUE; dots lead into an option."""
    import yaml

    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        scheme, colon, name = key.rpartition(":")
        if not equals or not name or (colon and not scheme):
            # Its value may be a secret.
            raise ValueError(
                f"--storage {key}: expected KEY=VALUE or SCHEME:KEY=VALUE, such as "
                "endpoint_url=http://localhost:9000 or s3:anon=true"
            )
        place = options.setdefault(scheme, {})
        *outer, last = name.split(".")
        for part in outer:
            place = place.setdefault(part, {})
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            place[last] = text
    return options


# ---- the scratch folder


def _new_scratch() -> Path:
    """A folder of this call, which goes with it; those that killed calls left go now."""
    folder = cache_folder() / "stores"
    for path in folder.glob("*"):
        # Without locks, only what nobody has used for long.
        with contextlib.suppress(OSError):
            caches.remove(caches.Entry("scratch", path, 0, path.stat().st_mtime))
    scratch = folder / uuid4().hex[:16]
    caches.hold(scratch)
    atexit.register(_forget, scratch, os.getpid())
    return scratch


def _forget(scratch: Path, process: int) -> None:
    # A forked process inherits the end of its parent, not the folder.
    if os.getpid() == process:
        shutil.rmtree(scratch, ignore_errors=True)


def _local(root: str, path: StoredPath) -> Path:
    return _scratch[root].joinpath(*path.parts)


def _root_of(path: StoredPath) -> str | None:
    """The destination that a path lies in; None for a source's."""
    if not _scratch:
        return None
    place = str(path)
    for root in _scratch:
        if place == root or place.startswith(f"{root}/"):
            return root
    return None


def _is_temporary(path: Path) -> bool:
    """Whether a name is one that `vlp.files` and the writer of shards give to unfinished files."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


# ---- the store


def _scheme(path: StoredPath) -> str:
    return path.parts[0].rstrip(":")


def _of_scheme(path: StoredPath) -> dict[str, Any]:
    """The options of fsspec for a path."""
    scheme = _scheme(path)
    everywhere = {} if scheme in _HTTP else _options.get("", {})
    return {**everywhere, **_options.get(scheme, {})}


def _url(path: StoredPath) -> str:
    """The whole address, with what opens it."""
    signed = _signed.get(str(path))
    if signed is not None:
        return signed

    # What opens another file of the folder may open this one, too.
    sibling = _signed.get(str(path.parent))
    if sibling is None:
        return str(path)
    place, question, query = sibling.partition("?")
    return f"{place.rpartition('/')[0]}/{path.name}{question}{query}"


def _file_system(path: StoredPath) -> tuple[Any, str]:
    """(fsspec's file system, the name of the path in it)."""
    import fsspec

    return fsspec.url_to_fs(_url(path), **_of_scheme(path))


def _tried(work: Callable[[], _Result], verb: str, path: StoredPath) -> _Result:
    """What `work` returns, which asks a store about a path; raises OSError after several tries, and
    at once where trying again changes nothing.
    """
    for attempt in range(_TRIES):
        try:
            return work()
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise PermissionError(
                f"the store does not let {path} be {verb} ({_told(error)}); look at its "
                "credentials: they may have ended, or lack the right. What is finished stays, and "
                "the same command goes on"
            ) from error
        except NotImplementedError as error:
            raise OSError(f"{path} cannot be {verb}: its store cannot ({_told(error)})") from error
        # Each file system has errors of its own.
        except Exception as error:
            if attempt == _TRIES - 1 or _is_of_credentials(error):
                raise OSError(
                    f"{path} cannot be {verb} ({attempt + 1} tries: {_told(error)}); what is "
                    "finished stays, and the same command goes on"
                ) from error
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last try returns or raises")


def _is_of_credentials(error: Exception) -> bool:
    """Whether there are no credentials, or only a part of them: no try brings others."""
    return "Credential" in type(error).__name__


def _told(error: Exception) -> str:
    return scrubbed(f"{type(error).__name__}: {error}")[:300]


def put(local: Path, path: StoredPath) -> None:
    """Put a local file at a path of a store, whole or not at all; raises OSError."""

    def once() -> None:
        file_system, name = _file_system(path)
        if _scheme(path) in _AT_ONCE:
            file_system.put_file(str(local), name)
            return

        # A reader must not meet a part.
        folder, _, last = name.rpartition("/")
        temporary = f"{folder}/.{last}.{uuid4().hex[:12]}.tmp"
        file_system.makedirs(folder, exist_ok=True)
        file_system.put_file(str(local), temporary)
        file_system.mv(temporary, name)

    try:
        _tried(once, "written", path)
    except FileNotFoundError as error:
        raise OSError(
            f"{path} cannot be written: there is no such bucket or repository ({_told(error)})"
        ) from None


def publish_soon(path: Path) -> None:
    """Bring to its store a file that grows in place: once in SENT_EVERY_S, and before the next file
    of its destination gets its name. Nothing for a file of this machine.
    """
    root = _root_of(path) if isinstance(path, StoredPath) else None
    if root is None:
        return

    assert isinstance(path, StoredPath)
    now = time.monotonic()
    if now - _growing.setdefault(path, now) > SENT_EVERY_S:
        put(_local(root, path), path)
        _growing[path] = now


def _publish_growing(root: str) -> None:
    for path in [path for path in _growing if _root_of(path) == root]:
        put(_local(root, path), path)
        del _growing[path]


def _removed(path: StoredPath) -> None:
    """Remove a file from its store, if it is there."""

    def once() -> None:
        file_system, name = _file_system(path)
        file_system.rm_file(name)

    with contextlib.suppress(FileNotFoundError):
        _tried(once, "removed", path)
    _listed.get(str(path.parent), {}).pop(str(path), None)


def _bring(path: StoredPath, local: Path) -> None:
    """Fetch a file of a destination into the scratch folder, if the store has it."""
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f".{local.name}.{uuid4().hex[:12]}.tmp")

    def once() -> None:
        file_system, name = _file_system(path)
        file_system.get_file(name, str(temporary))
        expected = _listed.get(str(path.parent), {}).get(str(path))
        # A connection that breaks off may end like a file.
        if expected is not None and temporary.stat().st_size != int(expected["size"]):
            look_again(path.parent)
            raise OSError(f"{temporary.stat().st_size} of {expected['size']} bytes came")

    try:
        _tried(once, "read", path)
        os.replace(temporary, local)
    except (FileNotFoundError, IsADirectoryError):
        pass
    finally:
        temporary.unlink(missing_ok=True)


def forget_copy(path: Path) -> None:
    """Let a file of a destination be fetched anew when it is next read: another call writes it."""
    root = _root_of(path) if isinstance(path, StoredPath) else None
    if root is not None:
        assert isinstance(path, StoredPath)
        _local(root, path).unlink(missing_ok=True)
        look_again(path.parent)


def bring(paths: Iterable[Path]) -> None:
    """Look anew which of these files there are, and fetch them many at a time; nothing for files of
    this machine.
    """
    stored = [path for path in paths if isinstance(path, StoredPath)]
    look_again(*{path.parent for path in stored})
    present = [path for path in stored if path.is_file()]
    with ThreadPoolExecutor(_AT_THE_SAME_TIME, "fetch") as pool:
        for _ in pool.map(os.fspath, present):
            pass


# ---- what stores say of their files

_compared: set[str] = set()  # addresses whose copies in the cache are known to be current


def look_again(*folders: Path) -> None:
    """Forget what is known of the files of these folders, and below."""
    for folder in folders:
        for listed in list(_listed):
            if listed == str(folder) or listed.startswith(f"{folder}/"):
                del _listed[listed]


def _version(info: Mapping[str, Any]) -> str:
    from vlp.data.fetch import version_of

    return version_of(info)


def _info(path: StoredPath) -> dict[str, Any] | None:
    """What the store says of a file; None where there is none."""
    if _scheme(path) in _HTTP:
        return _asked(path)
    try:
        info = _entries(path.parent).get(str(path))
        return None if _is_folder(info) else info
    # The right to read files need not be a right to list them.
    except PermissionError:
        return _asked(path)


def _is_folder(info: Mapping[str, Any] | None) -> bool:
    return info is not None and info.get("type") == "directory"


def _asked(path: StoredPath) -> dict[str, Any] | None:
    """What a server without lists says of a file, asked once."""
    from vlp.data.fetch import is_refused

    known = _listed.setdefault(str(path.parent), {})
    if str(path) in known:
        return known[str(path)] or None

    def once() -> dict[str, Any]:
        file_system, name = _file_system(path)
        try:
            info: dict[str, Any] = file_system.info(name)
        except FileNotFoundError as error:
            if is_refused(error, str(path)):
                return {}
            # fsspec says so of errors of a moment, too.
            raise OSError(str(error.__cause__ or error)) from error
        if info.get("size") is None:
            raise OSError("the server does not tell its size")
        return info

    known[str(path)] = _tried(once, "read", path)
    return known[str(path)] or None


def _entries(folder: StoredPath) -> dict[str, dict[str, Any]]:
    """What the store says of the files and folders of a folder, by their addresses; asked once."""
    if str(folder) not in _listed:
        _listed[str(folder)] = _listing(folder, lambda system, name: system.ls(name, detail=True))
    return _listed[str(folder)]


def _found_below(folder: StoredPath) -> list[str]:
    """The addresses of all files below a folder."""

    def find(file_system: Any, name: str) -> Iterable[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = file_system.find(name, detail=True)
        return entries.values()

    return list(_listing(folder, find))


def _listing(
    folder: StoredPath, listed: Callable[[Any, str], Iterable[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """What a store lists, by address; nothing where there is no such folder."""

    def once() -> dict[str, dict[str, Any]]:
        file_system, name = _file_system(folder)
        # This process may have listed it before another wrote there.
        file_system.invalidate_cache()
        try:
            entries = list(listed(file_system, name))
        except (FileNotFoundError, NotADirectoryError):
            return {}

        # A list of a file is the file itself.
        start = file_system._strip_protocol(str(folder)).rstrip("/") + "/"
        names = {entry["name"].rstrip("/"): entry for entry in entries}
        return {
            f"{folder}/{name.removeprefix(start)}": entry
            for name, entry in names.items()
            if name.startswith(start)
        }

    return _tried(once, "listed", folder)


def _fitting(urls: Iterable[str], pattern: str) -> Iterator[StoredPath]:
    for url in sorted(urls):
        name = url.rpartition("/")[2]
        is_hidden = name.startswith(".") and not pattern.startswith(".")
        if not is_hidden and fnmatch.fnmatchcase(name, pattern):
            yield StoredPath(url)
