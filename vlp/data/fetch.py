"""Whole remote files into a bounded local cache: locked so that one process fetches, retried, atomic, oldest out first."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from vlp.data.index import cache_folder

_CHUNK = 8 << 20
_TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubled before each further one


@dataclass(frozen=True)
class Cache:
    """Local copies of remote files, at most `limit_bytes` of them. Cheap to send to other processes."""

    limit_bytes: int
    storage: dict[str, Any] = field(default_factory=dict)  # options of the fsspec file system: endpoints, anon, …

    def get(self, url: str) -> str:
        """The path of a local copy, fetched if need be; raises OSError after several tries."""
        path = self.place(url)
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):  # not there yet, or just removed by another process
                os.utime(path)  # the time of use, for `_make_room`
                return str(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):  # others wait here for the one that fetches
                if not path.exists():
                    self._fetch(url, path)
        raise OSError(f"the cache {path.parent} is too small: copies vanish before they are read; set cache_gb higher")

    def drop_if_changed(self, url: str, size: int) -> None:
        """Remove the copy of a file that now has another size."""
        path = self.place(url)
        if path.exists() and path.stat().st_size != size:
            path.unlink(missing_ok=True)

    def place(self, url: str) -> Path:
        """Where the copy of `url` lies, if there is one."""
        folder, _, name = url.rpartition("/")
        return cache_folder() / "shards" / f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}" / os.path.basename(name)

    def _fetch(self, url: str, path: Path) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        for attempt in range(_TRIES):
            try:
                with fsspec.open(url, "rb", **self.storage) as source, open(temporary, "wb") as target:
                    expected = getattr(source, "size", None)
                    self._make_room(expected or 0, keep=path)
                    shutil.copyfileobj(source, target, _CHUNK)
                    if expected is not None and target.tell() != expected:
                        raise OSError(f"{url} gave {target.tell()} of {expected} bytes")
                os.replace(temporary, path)
                return
            except Exception as error:  # each file system has errors of its own; all are tried again and then OSErrors
                if _absent(error, url):
                    raise
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                if attempt == _TRIES - 1 or full:
                    hint = f"; the disk of {path.parent} is full, set cache_gb lower or VLP_CACHE elsewhere" if full else ""
                    told = error.__cause__ if isinstance(error, FileNotFoundError) else error  # what http met in truth
                    raise OSError(f"cannot fetch {url} ({attempt + 1} tries): {type(told).__name__}: {told}{hint}") from error
                time.sleep(_PAUSE_S * 2**attempt)
            finally:
                temporary.unlink(missing_ok=True)

    def _make_room(self, n_bytes: int, keep: Path) -> None:
        """Remove the copies unused for longest until `n_bytes` more fit. Processes that have one open keep reading it."""
        copies = []
        for copy in (cache_folder() / "shards").glob("*/*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it meanwhile
                status = copy.stat()
                copies.append((status.st_mtime, status.st_size, copy))
        excess = sum(size for _, size, _ in copies) + n_bytes - self.limit_bytes
        for _, size, copy in sorted(copies):
            if excess <= 0:
                break
            if copy != keep:
                copy.unlink(missing_ok=True)
                excess -= size


def _absent(error: Exception, url: str) -> bool:
    """Whether there is no such file. fsspec's http says so of every failure to open: 503, refused connections, timeouts."""
    cause = error.__cause__
    told = cause is None or not url.startswith(("http://", "https://")) or getattr(cause, "status", None) == 404
    return isinstance(error, FileNotFoundError) and told


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that vanishes with the process."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
