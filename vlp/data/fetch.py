"""Whole remote files into a bounded local cache: locked so that one process fetches, retried,
atomic, checked by digest, oldest out first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from vlp import caches, log
from vlp.caches import cache_folder
from vlp.data.asking import TRIES, fetching, is_absent, tried
from vlp.files import write_atomically
from vlp.privacy import address

_CHUNK = 8 << 20


# What a store says of a file's content, the surest first; names differ between stores.
_VERSIONS = (
    "ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c",
    "blob_id", "LastModified", "last_modified", "Last-Modified", "updated", "mtime",
)  # fmt: skip

_LOOKS_S = 0.05  # between two looks at a lock that another process holds
_ABANDONED_S = 86400  # age at which an unfinished file has lost its writer

# Copies that this process has seen to be whole: inode, size and time of change, by path and run.
_sound: dict[tuple[Path, float], tuple[int, int, int]] = {}


class Traffic:
    """Counts the bytes that this process got from stores, in all of its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_bytes = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Traffic, ()  # each process counts by itself

    def add(self, n_bytes: int) -> None:
        with self._lock:
            self._n_bytes += n_bytes

    def take(self) -> int:
        """The bytes since the last call."""
        with self._lock:
            n_bytes, self._n_bytes = self._n_bytes, 0
        return n_bytes


@dataclass(frozen=True)
class Cache:
    """Local copies of remote files, at most `limit_bytes` of them. Cheap to send to other
    processes.

    A copy is named by its address without credentials and signatures, which change from one run to
    the next. Beside it lies a note (JSON) with its digest, by which the first process of a run that
    uses it checks it.
    """

    limit_bytes: int
    # Options of the fsspec file system: endpoints, anon, …
    storage: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)  # of the files, by `privacy.address`
    since: float = field(default_factory=time.time)  # when the run began
    folder: Path = field(default_factory=lambda: cache_folder() / "shards")
    traffic: Traffic = field(default_factory=Traffic)

    def get(self, url: str, until: float = math.inf, lock_until: float | None = None) -> str:
        """The path of a whole copy, fetched if need be; raises OSError after several tries.

        until: no try is begun later (of time.monotonic); lock_until: so long another process that
        fetches the file is waited for, if not until then.
        """
        lock_until = until if lock_until is None else lock_until
        path = self.place(url)
        # What is read later must not be cleared away meanwhile.
        caches.hold(path.parent)
        for _ in range(TRIES):
            if self.at_hand(url):
                return str(path)

            path.parent.mkdir(parents=True, exist_ok=True)
            # Others wait here for the one that checks or fetches.
            with _locked(path.with_suffix(".lock"), lock_until):
                if not self._check(path):
                    self._fetch(url, path, until)

        # Each time another process made room between the fetch and the use.
        raise OSError(
            f"the cache {path.parent} is too small: copies vanish before they are read; "
            "set cache_gb higher"
        )

    def fetch_ahead(self, url: str) -> None:
        """Fetch a copy that will be needed, unless another process does so already."""
        self.get(url, lock_until=0)

    def answers(self, url: str) -> bool:
        """Whether the store gives the first byte of a file, or says that there is none."""
        try:
            with fsspec.open(url, "rb", **self.storage) as source:
                return len(source.read(1)) == 1
        # Each file system has errors of its own.
        except Exception as error:
            return is_absent(error, url)

    def drop_if_changed(self, url: str, size: int, version: str) -> bool:
        """Remove the copy of a file that has another size now, or another version where the store
        tells one.

        Whether the file changed, as far as is known here.
        """
        path = self.place(url)
        note = _read_note(path)

        # A copy without a note is one that was not finished, or of an older version.
        if note is None:
            changed = path.exists() and path.stat().st_size != size
        else:
            other_version = bool(version and note["version"]) and version != note["version"]
            changed = note["bytes"] != size or other_version

        if changed:
            path.unlink(missing_ok=True)
            _note(path).unlink(missing_ok=True)
        return changed

    def place(self, url: str) -> Path:
        """Where the copy of `url` lies, if there is one."""
        folder, name = folder_and_name(url)
        return self.folder / hashlib.sha256(folder.encode()).hexdigest()[:16] / name

    def at_hand(self, url: str) -> bool:
        """Whether a copy is there that this process has seen to be whole; if so, it counts as used
        now.
        """
        path = self.place(url)
        try:
            status = path.stat()
            if _sound.get((path, self.since)) != _identity(status):
                return False
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # of use, for `_make_room`
        except FileNotFoundError:  # not there yet, or just removed by another process
            return False
        return True

    def _check(self, path: Path) -> bool:
        """Whether a copy is there and whole. Its content is read once in a run; a damaged one is
        removed.
        """
        note = _read_note(path)
        try:
            status = path.stat()
            size_and_time = _identity(status)[1:]
            unchanged = note is not None and size_and_time == (note["bytes"], note["mtime_ns"])
            # The note's time tells whether a process of this run has read the copy already.
            checked = unchanged and _note(path).stat().st_mtime >= self.since
            same = unchanged and note is not None and (checked or _digest(path) == note["sha256"])
            if not same:
                log.warn(f"{path} is not as it was fetched; it is fetched again")
                path.unlink(missing_ok=True)
                return False

            if not checked:
                os.utime(_note(path))
        except FileNotFoundError:
            return False

        _sound[path, self.since] = _identity(status)
        return True

    def _fetch(self, url: str, path: Path, until: float) -> None:
        """Fetch a file, in several tries; raises OSError. The lock of its copy is held."""
        # Whoever holds the lock overwrites what a killed process left.
        temporary = path.with_name(f".{path.name}.tmp")

        def once() -> None:
            try:
                self._fetch_once(url, path, temporary)
            finally:
                temporary.unlink(missing_ok=True)

        tried(once, lambda error: is_absent(error, url), fetching(url, path.parent), until)

    def _fetch_once(self, url: str, path: Path, temporary: Path) -> None:
        """Fetch a file and its note in one try."""
        with fsspec.open(url, "rb", **self.storage) as source, open(temporary, "wb") as target:
            expected = getattr(source, "size", None)
            # Its whole size at once, so that others which make room count it.
            target.truncate(expected or 0)
            self._make_room(keep=path)
            digest = self._copy(source, target)

            # A connection that breaks off may end like a file.
            if expected is not None and target.tell() != expected:
                raise OSError(f"{url} gave {target.tell()} of {expected} bytes")

        # The note comes last: a copy without one is fetched again.
        status = temporary.stat()
        os.replace(temporary, path)
        note = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": digest,
            "version": self.versions.get(address(url), ""),
        }
        write_atomically(_note(path), json.dumps(note).encode())
        _sound[path, self.since] = _identity(status)

    def _copy(self, source: BinaryIO, target: BinaryIO) -> str:
        """Copy a file and return its SHA-256."""
        digest = hashlib.sha256()
        for chunk in iter(lambda: source.read(_CHUNK), b""):
            # Also what is thrown away, where the rest does not come.
            self.traffic.add(len(chunk))
            digest.update(chunk)
            target.write(chunk)
        return digest.hexdigest()

    def _make_room(self, keep: Path) -> None:
        """Remove the copies unused for longest until all fit, those that are being fetched
        included. Processes that have one open keep reading it.
        """
        copies = []
        n_bytes = 0
        for file in self.folder.glob("*/*"):
            is_unfinished = file.name.startswith(".") and file.suffix == ".tmp"
            if file.suffix == ".lock" or (file.name.startswith(".") and not is_unfinished):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                status = file.stat()
                if is_unfinished and status.st_mtime < time.time() - _ABANDONED_S:
                    file.unlink()
                    continue
                n_bytes += status.st_size
                if not is_unfinished:
                    copies.append((status.st_atime, status.st_size, file))

        # Notes and locks are not counted.
        excess = n_bytes - self.limit_bytes
        for _, size, copy in sorted(copies):
            if excess <= 0:
                break
            if copy != keep:
                copy.unlink(missing_ok=True)
                excess -= size


def folder_and_name(url: str) -> tuple[str, str]:
    """What names a remote file here: its folder, with what its query says of the version, and its
    name, ending in .tar.
    """
    place, question, query = address(url).partition("?")
    folder, _, name = place.rpartition("/")
    if not name.endswith(".tar"):
        name += ".tar"
    return f"{folder}{question}{query}", name


def version_of(info: Mapping[str, Any]) -> str:
    """What tells one content of a remote file from another, as its store says; empty where it says
    nothing.
    """
    return next((f"{name} {info[name]}" for name in _VERSIONS if info.get(name)), "")


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    """Inode, size and time of change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _read_note(path: Path) -> dict[str, Any] | None:
    """What is known of a copy, or None."""
    try:
        note = json.loads(_note(path).read_bytes())
    except (OSError, ValueError):
        return None

    whole = isinstance(note, dict) and {"bytes", "mtime_ns", "sha256", "version"} <= note.keys()
    return note if whole else None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path, until: float) -> Iterator[None]:
    """Hold a lock that vanishes with the process; OSError where another has it `until` then."""
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"{path.stem}.tar is still being fetched") from None
                time.sleep(_LOOKS_S)
        yield
