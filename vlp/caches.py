"""The user's cache: one folder, what lies in it by kind, when it was used, and what goes first.

FOLDER/embeddings/*.safetensors  rows of `vlp eval`, one file a set, and contents.json
FOLDER/search/NAME/              libraries of `vlp search` and `vlp embed`
FOLDER/index/*.bin               indices that cannot lie beside their shards
FOLDER/shards/NAME/              copies of remote shards
FOLDER/stores/NAME/              what a call is writing into a store; goes with it
FOLDER/packs/NAME/               a pack on its way into a store, or its input; goes once it is sent

A single file can go at any time: who has opened it keeps reading it. A folder that a process works
with is held by a lock on its mark (`.used`), and is not removed meanwhile; on a file system without
locks, not before it has been unused for 30 days.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from vlp import locks

KINDS = {
    "embeddings": "embeddings",
    "search": "search",
    "indices": "index",
    "downloads": "shards",
    "scratch": "stores",
    "packs": "packs",
}
OTHER = "other"  # what lies in the cache and is not ours to remove
_MARK = ".used"
_ABANDONED_S = 86400  # age at which an unfinished file has lost its writer
_UNHELD_S = 30 * 86400  # unused for so long a folder is no process's, where none can hold it
_UNITS = {"": 1e9, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_SPANS = {"min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}

# How what is kept is called, by kind: a hash of what it is of.
_NAMES = {
    "embeddings": r"[0-9a-f]{64}\.safetensors|contents\.json",
    "search": r"[0-9a-f]{24}",
    "indices": r"[0-9a-f]{16,24}\.bin",
    "downloads": r"[0-9a-f]{16}",
    "scratch": r"[0-9a-f]{16}",
    "packs": r"[0-9a-f]{16}",
}

_held: dict[Path, int] = {}  # open marks of this process, by folder
_STARTED = time.time()


def cache_folder() -> Path:
    """Where everything lies that is kept between calls and can be made again: $VLP_CACHE, else
    $XDG_CACHE_HOME/vlp, else ~/.cache/vlp.
    """
    if chosen := os.environ.get("VLP_CACHE"):
        return Path(chosen)

    # The specification has relative paths ignored.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "vlp"


# --- what is in use -------------------------------------------------------------------------------


def hold(folder: Path) -> None:
    """Keep `folder`, made if need be, from being removed until this process ends; it counts as used
    now.
    """
    folder = folder.absolute()
    if folder in _held:
        # Where there are no locks, this alone says that it is still worked with.
        with contextlib.suppress(OSError):
            os.utime(_held[folder])
        return

    mark = folder / _MARK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # removed between the two lines
            continue
        except OSError:  # shared for reading, or full: what is to be written there says so
            return

        # Without locks the mark's time, which is set next, has to do.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(OSError):
            os.utime(descriptor)

        # A mark that was removed while this process waited protects nothing.
        if mark.exists() and os.path.samestat(os.fstat(descriptor), mark.stat()):
            _held[folder] = descriptor
            return
        os.close(descriptor)


def touch(path: Path) -> None:
    """Let a file count as used now."""
    # Somebody else's file, or a cache that can only be read.
    with contextlib.suppress(OSError):
        os.utime(path)


@contextlib.contextmanager
def _alone(folder: Path, last_use: float) -> Iterator[bool]:
    """Whether no process works with a folder; none begins to while the block runs, but where there
    are no locks: there a folder is worked with that was used in the last 30 days.
    """
    with contextlib.ExitStack() as stack:
        is_unused = True
        try:
            stack.enter_context(locks.held(folder, advice=""))
            descriptor = os.open(folder / _MARK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except locks.InUse:
            is_unused = False
        except OSError as error:
            has_no_locks = error.errno in locks.UNSUPPORTED
            is_unused = has_no_locks and time.time() - last_use >= _UNHELD_S
        yield is_unused


# --- what there is --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Something that is kept and removed as a whole: a file, or a folder with all in it."""

    kind: str  # one of KINDS, or OTHER
    path: Path
    n_bytes: int
    last_use: float  # seconds since 1970


def entries(folder: Path) -> list[Entry]:
    """What a cache holds, without what is being written just now."""
    if not folder.is_dir():
        return []

    listed = []
    for kind, name in KINDS.items():
        if (folder / name).is_dir():
            for path in sorted((folder / name).iterdir()):
                # A cache may be put into a folder with shards of a person's own.
                listed.append(_entry(kind if _is_ours(kind, path) else OTHER, path))
    names = set(KINDS.values())
    others = [path for path in sorted(folder.iterdir()) if path.name not in names]
    listed += [_entry(OTHER, path) for path in others]
    return [entry for entry in listed if entry is not None]


def _is_ours(kind: str, path: Path) -> bool:
    """Whether a path has a name that this kind is given, finished or not."""
    name = re.sub(r"^\.(.*?)(\.[0-9a-f]{12})?\.tmp$", r"\1", path.name)
    return re.fullmatch(_NAMES[kind], name) is not None


def _entry(kind: str, path: Path) -> Entry | None:
    """A path with its size and last use; None for what is gone, or still being written."""
    is_file = path.is_symlink() or not path.is_dir()
    statuses = []
    for file in [path] if is_file else path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it meanwhile
            status = file.lstat()
            # To list a folder is to read it, as its times say.
            if not stat.S_ISDIR(status.st_mode):
                statuses.append(status)
    if is_file and not statuses:
        return None

    # Reading is noted by `touch` and `hold`, because many systems note no times of access.
    last_use = max([max(one.st_mtime, one.st_atime) for one in statuses], default=0.0)
    is_unfinished = path.name.startswith(".") and path.name.endswith(".tmp")
    if is_unfinished and time.time() - last_use < _ABANDONED_S:
        return None
    return Entry(kind, path, sum(one.st_size for one in statuses), last_use)


# --- what goes ------------------------------------------------------------------------------------


def remove(entry: Entry) -> bool:
    """Remove an entry at once or not at all; False where a process works with it."""
    path = entry.path
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return True

    # Under another name first, so that nobody meets a part of it.
    with _alone(path, entry.last_use) as is_unused:
        if not is_unused:
            return False
        leaving = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
        os.rename(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)
    return True


def bound(folder: Path, limit_bytes: int) -> None:
    """Remove kept embeddings, those unused for longest first, until `limit_bytes` hold the rest.

    What this process has used stays, also where that alone is more. Safe beside other processes:
    they keep reading what they have opened.
    """
    # The folder may be anybody's: only what bears our names is ours to remove.
    paths = [path for path in folder.glob("*.safetensors") if _is_ours("embeddings", path)]
    kept = [_entry("embeddings", path) for path in paths]
    by_use = sorted((entry for entry in kept if entry), key=lambda entry: entry.last_use)

    excess = sum(entry.n_bytes for entry in by_use) - limit_bytes
    for entry in by_use:
        if excess <= 0 or entry.last_use >= _STARTED:
            break
        # Another user's file stays; nothing but tidying failed.
        with contextlib.suppress(OSError):
            remove(entry)
            excess -= entry.n_bytes


# --- what people write ----------------------------------------------------------------------------


def bytes_of(text: str) -> int:
    """A size such as 20GB, 500MB or 1.5TB in bytes; a bare number counts GB. Raises ValueError."""
    return int(_number(text, _UNITS, "a size such as 20GB, 500MB or 1.5TB, above 0"))


def seconds_of(text: str) -> float:
    """A span such as 30d, 12h, 2w or 45min in seconds. Raises ValueError."""
    return _number(text, _SPANS, "a span of time such as 30d, 12h, 2w or 45min, above 0")


def _number(text: str, units: dict[str, float], expected: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?([A-Za-z]*)", text.strip())
    factor = units.get(match[2]) if match else None
    if match is None or factor is None or float(match[1]) == 0:
        raise ValueError(f"found {text!r}, expected {expected}")
    return float(match[1]) * factor


def size_text(n_bytes: float) -> str:
    """A size in its largest fitting unit."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def total(listed: Iterable[Entry]) -> int:
    """Bytes of some entries together."""
    return sum(entry.n_bytes for entry in listed)
