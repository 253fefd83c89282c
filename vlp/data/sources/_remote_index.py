"""Which shards lie at addresses elsewhere, and their index: a copy of the one beside them, or one
that is made here.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from vlp import log
from vlp.caches import cache_folder
from vlp.data.asking import fetching, is_refused, status_of, tried
from vlp.data.fetch import Cache, folder_and_name
from vlp.data.index import alone
from vlp.data.index_file import NAME, UNDIGESTED, open_index, save_index
from vlp.data.member_file import OfShard, may_have, of_shard, save_members, usable_members
from vlp.data.paths import is_packed
from vlp.data.rows import Shard
from vlp.data.scan import scan
from vlp.files import replacing
from vlp.privacy import address

# Shards of a folder from which on it is listed as a whole: stores give a thousand names at once.
_LISTED_FROM = 64
_ASKED_AT_ONCE = 32  # shards that a store without lists is asked for
_FIRST_BYTES = 4096  # of an index: its header's check sum among them tells it from every other


def list_shards(path: str, storage: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The addresses of the shards that `path` names, and what the store says of each. Raises
    ValueError where they cannot be read.
    """
    infos: dict[str, dict[str, Any]] = {}  # of those that a listing gave
    urls: list[str] = []
    for part in path.split("::"):
        if part.endswith("/"):
            with _explained(part):
                by_url = _in_folder(part, storage)
            urls += sorted(by_url)
            infos |= {url: info for url, info in by_url.items() if info.get("size") is not None}
        else:
            urls += braceexpand(part)

    if not urls:
        raise ValueError(
            f"{path!r} names no shards; expected .tar addresses or a folder's address ending in /"
        )
    packed = [url for url in map(address, urls) if is_packed(url)]
    if packed:
        raise ValueError(
            f"{packed[0]} is compressed, but samples are read from any place of a plain tar; fetch "
            "the shards and write plain ones: vlp data reshard FOLDER --to DIR (the source "
            "webdataset reads them as they are, in their order)"
        )

    # One look at each shard now: a missing one would be met hours later.
    with _explained(urls[0]):
        infos |= _asked([url for url in urls if url not in infos], storage)
    return urls, [infos[url] for url in urls]


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Around questions to a store: ValueError for what is not there, or not for us."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{url}: {error}") from None  # fsspec names the package to install
    except Exception as error:
        if not is_refused(error, url):
            raise
        hint = ""
        if status_of(error) in (401, 403) or isinstance(error, PermissionError):
            hint = "; the server refuses it: is its signature too old, or does it need `storage` "
            hint += "options, such as a token?"
        # The first line says what: further ones are advice on the client that was used.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no shard at {reason or address(url)}{hint}") from None


def _in_folder(folder: str, storage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the store says of each tar of a folder, by address."""
    file_system, root = fsspec.url_to_fs(folder, **storage)
    entries = tried(
        lambda: file_system.glob(root.rstrip("/") + "/*.tar", detail=True),
        lambda error: is_refused(error, folder),
        fetching(address(folder), cache_folder()),
    )
    return {file_system.unstrip_protocol(name): entries[name] for name in entries}


def _asked(urls: list[str], storage: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the store says of each address: by the list of its folder where shards are many and the
    store has lists, else by a request each, many at once.
    """
    if not urls:
        return {}
    file_system, _ = fsspec.url_to_fs(urls[0], **storage)
    names = {url: file_system._strip_protocol(url) for url in urls}

    # What http shows as a list is a page of links, without sizes.
    listed: dict[str, dict[str, Any]] = {}
    if not urls[0].startswith(("http://", "https://")) and len(urls) >= _LISTED_FROM:
        for folder in {name.rpartition("/")[0] for name in names.values()}:
            # This process may have listed the folder before a shard was added.
            file_system.invalidate_cache(folder)
            try:
                entries = file_system.ls(folder, detail=True)
            except OSError:
                # Rights to read every file need not be rights to list them.
                continue
            for entry in entries:
                if entry.get("size") is not None:
                    listed[entry["name"]] = entry

    infos = {url: listed[name] for url, name in names.items() if name in listed}
    missing = [url for url in urls if url not in infos]

    def ask(url: str) -> dict[str, Any]:
        # Of many thousand answers some are errors of a moment.
        return tried(
            lambda: file_system.info(url),
            lambda error: is_refused(error, url),
            fetching(address(url), cache_folder()),
        )

    with ThreadPoolExecutor(_ASKED_AT_ONCE, "list") as pool:
        return infos | dict(zip(missing, pool.map(ask, missing)))


def index_of(urls: list[str], sizes: list[int], changed: set[str], cache: Cache) -> list[Shard]:
    """The shards at the addresses, without their rows; those that no index knows are fetched once.

    changed: the addresses of those that changed since they were fetched here.
    """
    # A folder's index is read once for all of its shards.
    folders: dict[str, dict[str, str]] = {}  # the addresses of each folder, by name
    for url in urls:
        folder, name = folder_and_name(url)
        folders.setdefault(folder, {})[name] = url

    sized = dict(zip(urls, sizes))
    by_url: dict[str, Shard] = {}
    for folder, named in folders.items():
        by_url |= _of_folder(folder, named, sized, changed, cache)
    return [by_url[url] for url in urls]


def _of_folder(
    folder: str, named: Mapping[str, str], sized: dict[str, int], changed: set[str], cache: Cache
) -> dict[str, Shard]:
    """The shards of one folder, by address; `named`: their addresses by name."""
    beside = _copied(next(iter(named.values())), cache)
    made_here = cache_folder() / "index" / f"{digest(folder)[:16]}.bin"

    known = _known(named, sized, changed, beside, _opened(made_here))
    if len(known) == len(named):
        return known

    with alone(made_here, f"the index of {folder}"):
        # Whoever this one waited for may have made it.
        others = _opened(made_here)
        known = _known(named, sized, changed, beside, others)
        stale = [url for url in named.values() if url not in known]
        if not stale:
            return known
        log.warn(
            f"{len(stale)} of {len(named)} shards have no index beside them; "
            "each is fetched once to make it"
        )
        with_members: dict[str, OfShard] = {}
        try:
            for url in stale:
                tar = Path(cache.get(url))
                shard = known[url] = scan(tar)
                # While it is here: a run that reads them would have to fetch it again.
                if may_have(shard):
                    with_members[folder_and_name(url)[1]] = of_shard(tar, shard)
        except ValueError as error:
            raise ValueError(f"{url}: {error}") from None
        finally:  # where one cannot be read, the others are known the next time
            used = {name: known[url] for name, url in named.items() if url in known}
            save_index(made_here, others | used)
            if with_members:
                place = members_made_here(folder)
                save_members(place, usable_members(place) | with_members)
    return known


def _known(
    named: Mapping[str, str],
    sized: dict[str, int],
    changed: set[str],
    beside: dict[str, Shard],
    made_here: dict[str, Shard],
) -> dict[str, Shard]:
    """The shards, by address, that an index knows: the one beside them, else the one made here."""
    known = {}
    for name, url in named.items():
        candidates = [beside.get(name)]
        if url not in changed:
            candidates.append(made_here.get(name))

        # An index may be older than its shards: sizes tell most of that, digests the rest.
        fitting = [shard for shard in candidates if shard and shard.size == sized[url]]
        if fitting:
            known[url] = fitting[0]
    return known


def _opened(place: Path) -> dict[str, Shard]:
    """The index that was made here before, where there is a usable one."""
    try:
        shards = open_index(place)
    except OSError:
        return {}
    except ValueError as error:
        log.warn(f"{place} is not a usable index ({error}); its shards are scanned again")
        return {}

    if any(shard.stored is None for shard in shards.values()):  # of the version before
        save_index(place, shards)
    return shards


def members_made_here(folder: str) -> Path:
    """Where the file that tells of the members of a folder's shards lies if it is made here."""
    return cache_folder() / "index" / f"{digest(folder)[:16]}_members.bin"


def _copied(url: str, cache: Cache) -> dict[str, Shard]:
    """What the index beside remote shards says; empty where there is none."""
    copy = copied(url, NAME, cache)
    if copy is None:
        return {}
    try:
        # An index without digests spares fetching all shards; their samples go unchecked.
        shards = open_index(copy, oldest=UNDIGESTED)
    except ValueError as error:
        beside = _beside(url, NAME)
        log.warn(f"{beside} is not a usable index ({error}); its shards are scanned again")
        copy.unlink(missing_ok=True)
        return {}

    if any(shard.stored is None for shard in shards.values()):  # of a version before
        save_index(copy, shards)
    return shards


def copied(url: str, name: str, cache: Cache) -> Path | None:
    """A copy of the file `name` beside remote shards, which is kept here; None where there is none.

    `url` is one of the folder's shards: its credentials and signature may open the file, too.
    """
    beside = _beside(url, name)

    def once() -> Path:
        with fsspec.open(beside, "rb", **cache.storage) as source:
            first = source.read(_FIRST_BYTES)
            in_cache = digest(address(beside).encode() + first)[:24]
            copy = cache_folder() / "index" / f"{in_cache}.bin"
            if not copy.exists():
                _copy(first, source, copy, address(beside))
            return copy

    # A file that is taken for missing costs the transfer of all shards.
    try:
        return tried(
            once,
            lambda error: is_refused(error, beside),
            fetching(address(beside), cache_folder()),
        )
    except (FileNotFoundError, PermissionError):
        return None


def _beside(url: str, name: str) -> str:
    place, question, query = url.partition("?")
    return f"{place.rpartition('/')[0]}/{name}{question}{query}"


def _copy(first: bytes, source: BinaryIO, copy: Path, name: str) -> None:
    """Put what was read `first` of a file, and the rest of it, at `copy`."""
    with alone(copy, f"a copy of {name}"):
        if copy.exists():
            return
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as temporary, temporary.open("xb") as target:
            target.write(first)
            shutil.copyfileobj(source, target, 8 << 20)

            # A connection that breaks off may end like a file.
            expected = getattr(source, "size", None)
            if expected is not None and target.tell() != expected:
                raise OSError(f"{name} gave {target.tell()} of {expected} bytes")


def digest(name: str | bytes) -> str:
    """SHA-256 of a name, in hex."""
    return hashlib.sha256(name.encode() if isinstance(name, str) else name).hexdigest()
