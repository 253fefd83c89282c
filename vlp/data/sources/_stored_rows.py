"""What is known of some shards, left where it lies in files and read in parts: the page cache of a
machine holds it once for all of its processes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlp import log
from vlp.caches import cache_folder
from vlp.data.index_file import checked, open_index, opened
from vlp.data.rows import EXTENT, ROW, SCATTERED, Shard, Stored, extents
from vlp.data.scan import scan
from vlp.data.sources._table import usable_rows
from vlp.data.summary import ROW_COLUMNS

_KEPT_SHARDS = 64  # of which a process keeps more than where their rows lie


class Bodies:
    """Bytes of each shard that lie in files. Sent to every loader process: what is kept of a shard
    lies in shared memory.

    They are checked when a process reads the first of a shard's. Where the file was damaged, or
    replaced while the run goes on, they are looked for in the file that is there now, and else made
    of the tar again, and the file mended.
    """

    def __init__(self, of_shards: Sequence[Stored | None]) -> None:
        """None: nothing of a shard."""
        files: dict[tuple[str, bytes], int] = {}
        places = np.zeros((len(of_shards), 4), np.int64)
        digests = np.zeros((len(of_shards), hashlib.sha256().digest_size), np.uint8)
        for s, stored in enumerate(of_shards):
            if stored is None:
                continue
            file = files.setdefault((stored.path, stored.head), len(files))
            places[s] = file, stored.offset, stored.n_bytes, stored.n_extents
            digests[s] = np.frombuffer(bytes.fromhex(stored.digest), np.uint8)

        self._files = list(files)
        self._places = _shared(places)
        self._digests = _shared(digests)
        self._forget()

    def _forget(self) -> None:
        """Begin without what a process finds out by itself."""
        self._checked = bytearray(len(self._places))  # shards whose bytes this process has checked
        self._moved: dict[int, Stored] = {}  # shards whose bytes lie elsewhere by now
        self._made: dict[int, bytes] = {}  # bytes that no file holds any more
        self._told = False  # that a file is of no use

    def __getstate__(self) -> dict[str, Any]:
        found_out = ("_checked", "_moved", "_made", "_told")
        return {name: value for name, value in vars(self).items() if name not in found_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _lying_in(self, path: str, inode: int, mtime_ns: int) -> dict[str, Stored]:
        """Where the bytes of shards lie in the file that is at `path` now, by their digests; raises
        OSError, ValueError.
        """
        raise NotImplementedError

    def _make(self, path: str) -> bytes:
        """The bytes of the shard whose tar is at `path`, from the tar; ValueError."""
        raise NotImplementedError

    def body(self, s: int, path: str) -> bytes:
        """The bytes of a shard whose tar is at `path`; ValueError where they are nowhere."""
        if s in self._made:
            return self._made[s]
        stored = self._stored(s)
        try:
            return checked(opened(stored.path, stored.head), stored)
        except (OSError, ValueError) as error:
            reason = error

        # Another run may have indexed further shards of the folder.
        moved = self._moved_to(stored)
        if moved is not None and moved != stored:
            self._moved[s] = moved
            return self.body(s, path)

        if not self._told:
            self._told = True
            log.warn(
                f"{stored.path} is of no use for {path} ({reason}): the tar is read again, and the "
                "index mended where it can be written"
            )
        body = self._made_again(stored, path, reason)
        if not _mended(stored, body):
            _make_room(self._made)
            self._made[s] = body
        return body

    def _moved_to(self, stored: Stored) -> Stored | None:
        try:
            status = os.stat(stored.path)
            there = self._lying_in(stored.path, status.st_ino, status.st_mtime_ns)
        except (OSError, ValueError):
            return None
        return there.get(stored.digest)

    def _made_again(self, stored: Stored, path: str, reason: Exception) -> bytes:
        """The bytes of a shard, from its tar at `path`; ValueError where that has others. `reason`:
        why those in the file are of no use.
        """
        try:
            body = self._make(path)
        except ValueError as error:  # remote ones are not here before the first step
            advice = "delete that index, and the next start makes it anew"
            if Path(stored.path).is_relative_to(cache_folder()):
                Path(stored.path).unlink(missing_ok=True)
                advice = "its copy is removed; start again, which fetches it anew"
            raise ValueError(
                f"{stored.path} is of no use for {path} ({reason}), nor is the tar ({error}); "
                f"{advice}"
            ) from None

        if hashlib.sha256(body).hexdigest() != stored.digest:
            raise ValueError(
                f"{path} is not what was indexed when the run began, and its index is of no use "
                f"any more ({reason})"
            )
        return body

    def _part(self, s: int, path: str, offset: int, n_bytes: int) -> bytes:
        """Some of a shard's bytes, which are checked the first time."""
        if s in self._made or not self._checked[s]:
            body = self.body(s, path)
            # What was made may have to make room, and its place in the file stays damaged.
            self._checked[s] = s not in self._made
            return body[offset : offset + n_bytes]

        stored = self._stored(s)
        try:
            file = opened(stored.path, stored.head)
            return file.read(stored.offset + offset, n_bytes)
        except (OSError, ValueError):
            self._checked[s] = 0
            return self._part(s, path, offset, n_bytes)

    def _stored(self, s: int) -> Stored:
        if s in self._moved:
            return self._moved[s]
        file, offset, n_bytes, n_extents = self._places[s].tolist()
        digest = bytes(self._digests[s].tolist()).hex()
        path, head = self._files[file]
        return Stored(path, head, offset, n_bytes, n_extents, digest)


class StoredRows(Bodies):
    """Where the members of sample i lie: rows and extents, in index files."""

    def __init__(
        self, shards: Sequence[Shard], n_usable: np.ndarray, left_out: dict[int, frozenset[int]]
    ) -> None:
        """n_usable [shards]: samples; left_out: the kinds of samples left out, by shard."""
        of_shards = [shard.stored for shard in shards]
        assert None not in of_shards, "an index is written before it is used"
        super().__init__(of_shards)
        self._left_out = left_out
        self._ends = _shared(np.cumsum(n_usable))  # samples up to and with each shard's

    def _forget(self) -> None:
        super()._forget()
        self._usable: dict[int, np.ndarray] = {}  # numbers of a shard's usable rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_usable"}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shard_of(self, i: int) -> int:
        """The position of the shard that holds sample i."""
        return int(np.searchsorted(self._ends.numpy(), i, side="right"))

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The positions of the shards that hold these samples."""
        return np.searchsorted(self._ends.numpy(), samples, side="right")

    def counts(self) -> np.ndarray:
        """Usable samples of each shard, int64."""
        return np.diff(self._ends.numpy(), prepend=0)

    def row_number(self, i: int, path: str) -> int:
        """Which row of its shard, whose tar is at `path`, sample i is."""
        s = self.shard_of(i)
        number = i - (int(self._ends[s - 1]) if s else 0)
        if s not in self._left_out:
            return number

        if s not in self._usable:
            rows = np.frombuffer(self.body(s, path), ROW_COLUMNS, self._n_rows(s))
            _make_room(self._usable)
            self._usable[s] = usable_rows(rows, self._left_out[s])
        return int(self._usable[s][number])

    def members(self, i: int, path: str) -> tuple[list[tuple[int, int]], int]:
        """(offset, bytes) of the members of sample i in its tar at `path`, and their digest."""
        s = self.shard_of(i)
        data = self._part(s, path, self.row_number(i, path) * ROW.size, ROW.size)
        offset, length, _, digest, *_, flags = ROW.unpack(data)
        if not flags & SCATTERED:
            return [(offset, length)], digest

        n_extents = int(self._places[s, 3])
        table = self._part(s, path, self._n_rows(s) * ROW.size, n_extents * EXTENT.size)
        return extents(table, offset, length), digest

    def _lying_in(self, path: str, inode: int, mtime_ns: int) -> dict[str, Stored]:
        return _by_digest(path, inode, mtime_ns)

    def _make(self, path: str) -> bytes:
        shard = scan(Path(path))
        return shard.rows + shard.extents

    def _n_rows(self, s: int) -> int:
        _, _, n_bytes, n_extents = self._places[s].tolist()
        return (n_bytes - n_extents * EXTENT.size) // ROW.size


def _mended(stored: Stored, body: bytes) -> bool:
    """Write a shard's bytes back to their place in the file, where that is still the same file
    and may be written; whether it holds them now.
    """
    # In place: these are the bytes that its header promises, whoever reads them meanwhile.
    try:
        with open(stored.path, "r+b") as file:
            opened(stored.path, stored.head, again=True)  # ValueError: it is another's by now
            file.seek(stored.offset)
            file.write(body)
        return checked(opened(stored.path, stored.head), stored) == body
    except (OSError, ValueError):
        return False


def _make_room(kept: dict[int, Any]) -> None:
    """Let the oldest of what is kept of shards go."""
    while len(kept) >= _KEPT_SHARDS:
        kept.pop(next(iter(kept)))


@lru_cache(maxsize=2)
def _by_digest(path: str, inode: int, mtime_ns: int) -> dict[str, Stored]:
    shards = open_index(Path(path)).values()
    return {shard.stored.digest: shard.stored for shard in shards if shard.stored is not None}


def _shared(values: np.ndarray) -> torch.Tensor:
    """In shared memory: loader processes receive a handle instead of a copy."""
    return torch.from_numpy(values).share_memory_()
