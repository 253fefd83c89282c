"""The index of a folder of shards: where every usable sample lies, so that counts and random access
read no tar.

One file, `_index.bin` (`vlp.data.index_file`), lies beside the shards, or in the cache where the
folder cannot be written.

A shard whose size or time of modification differs from the header's, or that is not named there,
is scanned again: it is read once, whole, because every sample gets a digest. So foreign shards need
no preparation, and an index can be deleted at any time; one of the version before is written anew.
One process of a machine does it, and the others wait for it.

Where only the inode's time (ctime) differs, which no tool can set back, the tar was copied with its
times, or replaced in place: some of its samples are compared with their digests, and where one
differs the whole is scanned again. A change that this misses is met when the sample is read.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from vlp import locks, log
from vlp.caches import cache_folder
from vlp.data.index_file import NAME, VERSION, OldIndex, load, open_index, save_index
from vlp.data.paths import unreadable
from vlp.data.rows import Shard
from vlp.data.scan import scan
from vlp.data.stored import StoredPath

_N_COMPARED = 16  # samples of a tar whose inode changed
# While an index is made it is saved from time to time: first after so long, then each time that
# half as long again has passed, so that all writing costs no more than a few times the last.
_SAVED_AFTER_S = 60.0
_POLL_S = 0.2  # between two looks whether another process is done
_TOLD_AFTER_S = 2.0  # that one waits; then each time that it took four times as long
_ADVICE = "Ctrl-C ends this process only, and loses nothing"
_MEMORY = Path("/dev/shm")

Known = TypeVar("Known")  # what is known of a shard


def index(paths: list[Path]) -> list[Shard]:
    """The shards at `paths`, in that order, scanning those that the folders' indices do not know.

    Raises ValueError for what is no tar to read from.
    """
    shards = located(paths)
    damaged = [path for path, shard in zip(paths, shards) if not _loads(shard)]
    if damaged:
        log.warn(
            f"the index of {damaged[0].parent} is not a usable index (the rows of {len(damaged)} "
            "shards are damaged); these shards are scanned again"
        )
        shards = located(paths, anew=set(damaged))
        for shard in shards:
            load(shard)
    return shards


def located(paths: list[Path], anew: Collection[Path] = ()) -> list[Shard]:
    """As `index`, but the rows stay where `Shard.stored` says: the cost is that of the shards'
    number. `anew`: those to scan in any case.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)

    by_path: dict[Path, Shard] = {}
    for folder, of_folder in folders.items():
        by_path |= zip(of_folder, _of_folder(folder, of_folder, anew))
    return [by_path[path] for path in paths]


def _of_folder(folder: Path, paths: list[Path], anew: Collection[Path]) -> list[Shard]:
    shards = _current(folder, paths, anew)
    if shards is None:
        with alone(places(folder)[1], f"the index of {folder}"):
            # Whoever this one waited for may have made it.
            shards = _current(folder, paths, anew) or _made(folder, paths, anew)
    return [shards[path.name] for path in paths]


def _current(folder: Path, paths: list[Path], anew: Collection[Path]) -> dict[str, Shard] | None:
    """What a folder's index says of its shards, where one is there that fits all of `paths`."""
    for place in places(folder):
        try:
            shards = open_index(place, oldest=VERSION)
        except (OSError, ValueError):
            continue  # there is none, or one to tell of when another is made
        if not _unknown(shards, paths, anew):
            return shards
    return None


def _made(folder: Path, paths: list[Path], anew: Collection[Path]) -> dict[str, Shard]:
    """Scan those of a folder's shards at `paths` that no index knows, and write its index."""
    indices = list(_indices(folder)) or [{}]
    # Where data are shared for reading, the index beside them may be older than that in the cache.
    shards = min(indices, key=lambda known: len(_unknown(known, paths, anew)))
    stale = []
    for path in _unknown(shards, paths, anew):
        if path in anew or not _same_but_for_ctime(shards.get(path.name), path):
            stale.append(path)

    if any(shard.stored is None for shard in shards.values()):
        log.warn(f"the index of {folder} is of an older version; it is written anew")
    names = {path.name for path in paths}
    saving = Saving()
    try:
        for n_done, path in enumerate(stale):
            if n_done and saving.is_due():
                log.warn(f"indexed {n_done:,} of {len(stale):,} shards of {folder}")
                _save(folder, shards, names)
                saving.done()
            shards[path.name] = _scanned(path)
    finally:  # where one cannot be read, the others are known the next time
        _save(folder, shards, names)
    return shards


class Saving:
    """When to save what is made of many shards: who is ended in the middle, or followed by another,
    loses a part only.
    """

    def __init__(self) -> None:
        self._started = self._saved = time.monotonic()

    def is_due(self) -> bool:
        made_s = self._saved - self._started
        return time.monotonic() - self._saved > max(_SAVED_AFTER_S, made_s / 2)

    def done(self) -> None:
        """It is saved."""
        self._saved = time.monotonic()


def piece_of(path: Path) -> Path:
    """The index of one shard beside it, which whoever writes into a store leaves for whoever
    indexes the folder and would have to fetch all shards.
    """
    return path.with_name(f".{path.stem}.index")


def _scanned(path: Path) -> Shard:
    if not isinstance(path, StoredPath):
        return scan(path)

    try:
        shard = open_index(piece_of(path), oldest=VERSION)[path.name]
        if shard.size == path.stat().st_size:
            return shard
    except (OSError, ValueError, KeyError):
        pass  # another's shard

    # Not the times of its copy.
    shard, status = scan(path), path.stat()
    shard.mtime_ns, shard.ctime_ns = status.st_mtime_ns, status.st_ctime_ns
    return shard


def _indices(folder: Path) -> Iterator[dict[str, Shard]]:
    """The indices that there are of a folder, also older ones; says which are of no use."""
    for place in places(folder):
        try:
            yield open_index(place)
        except OldIndex as error:
            log.warn(f"{place} is {error}; its shards are read anew")
        except ValueError as error:
            log.warn(f"{place} is not a usable index ({error}); its shards are scanned again")
        except OSError:
            continue  # there is none


def _unknown(shards: dict[str, Shard], paths: list[Path], anew: Collection[Path]) -> list[Path]:
    """The paths whose tars differ from what an index says, as far as sizes and times tell. Raises
    ValueError for one that cannot be read.
    """
    result = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise ValueError(unreadable(path, error)) from None

        # Of a thousand shards one may be new: only that one is read.
        shard = shards.get(path.name)
        indexed = None if shard is None else (shard.size, shard.mtime_ns, shard.ctime_ns)
        is_current = indexed == (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        # Whoever indexed it before it came to the store knew the times of another machine.
        if isinstance(path, StoredPath) and shard is not None and shard.ctime_ns:
            is_current = shard.size == status.st_size
        if shard is None or not is_current or (path in anew and not _loads(shard)):
            result.append(path)
    return result


def _same_but_for_ctime(shard: Shard | None, path: Path) -> bool:
    """Whether a tar holds what was indexed although its inode changed, as far as some of its
    samples tell; then the index is told the new time.
    """
    status = path.stat()
    if shard is None or (shard.size, shard.mtime_ns) != (status.st_size, status.st_mtime_ns):
        return False
    if shard.count == 0 or not _loads(shard):
        return False

    step = max(1, shard.count // _N_COMPARED)
    try:
        with path.open("rb") as file:
            for i in range(0, shard.count, step):
                shard.sample(file, i)
    except (OSError, ValueError):
        return False
    shard.ctime_ns = status.st_ctime_ns
    return True


def _loads(shard: Shard) -> bool:
    """Read the rows of a shard, if they are whole."""
    try:
        load(shard)
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def alone(place: Path, making: str) -> Iterator[None]:
    """Let one process of this machine at a time make the file at `place`; the others wait, and say
    for what. The lock ends with its process, however that ends, and the next one goes on.
    """
    started = time.monotonic()
    told_after_s = _TOLD_AFTER_S
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locks.held(place, advice=_ADVICE, beside=True))
                break
            except locks.InUse as error:
                in_use = error
            except OSError:
                # A cache that cannot be written: each process makes it for itself.
                break

            waited_s = time.monotonic() - started
            if waited_s > told_after_s:
                # From every rank: on other machines none is the first.
                log.warn(f"waiting for {making} ({locks.age_text(waited_s)}): {in_use}")
                told_after_s = 4 * waited_s
            time.sleep(_POLL_S)
        yield


def places(folder: Path, name: str = NAME) -> list[Path]:
    """Where the file `name` of a folder of shards may lie: beside them, in the cache, or in the
    memory of this process.
    """
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    kind = "" if name == NAME else name.removesuffix(".bin")
    in_cache = f"{digest}{kind}.bin"
    return [folder / name, cache_folder() / "index" / in_cache, *_in_memory(in_cache)]


def _in_memory(name: str) -> list[Path]:
    """Where an index lies that could be written nowhere else, if this process has such."""
    return [_temporary_folder() / name] if _temporary_folder.cache_info().currsize else []


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    """A folder that goes with this process."""
    parent = _MEMORY if _MEMORY.is_dir() and os.access(_MEMORY, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="vlp-index-", dir=parent)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _save(folder: Path, shards: dict[str, Shard], names: Collection[str]) -> None:
    """Write the index of a folder's shards, without those that are gone, where that is possible.

    `names`: of the shards that are wanted now.
    """
    kept = present(folder, shards, names)
    save(folder, NAME, f"the index of {folder}", lambda place: save_index(place, kept))


def present(folder: Path, known: dict[str, Known], names: Collection[str]) -> dict[str, Known]:
    """What is known of the shards of a folder, without those that are gone, in order. `names`: of
    the shards that are wanted now.
    """
    try:
        there = {*os.listdir(folder), *names}
    except OSError:  # one that may be entered, but not listed
        there = set(known)
    return {name: known[name] for name in sorted(known) if name in there}


def save(folder: Path, name: str, what: str, write: Callable[[Path], None]) -> None:
    """Write the file `name` of a folder of shards where that is possible: beside them, in the
    cache, or in memory. `what`: in words.
    """
    # A read-only folder is normal for shared data: the cache is the second place.
    beside, cached = places(folder, name)[:2]
    reason = None
    for place in (beside, cached):
        try:
            return write(place)
        except OSError as error:
            # Training looks for it there alone; a source that cannot be written is normal.
            if isinstance(place, StoredPath) and error.errno != errno.EROFS:
                raise
            reason = error

    log.warn(f"{what} could not be saved ({reason}); it is built again next time")
    try:
        write(_temporary_folder() / cached.name)
    except OSError as error:
        raise ValueError(
            f"{what} can be written neither there nor to {cached.parent} "
            f"({reason}) nor to {_MEMORY} ({error}); make room, or set VLP_CACHE to another folder"
        ) from None
