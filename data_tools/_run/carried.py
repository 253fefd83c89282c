"""The sounds, frames and numbers beside a shard's samples, which go with these into new shards; and
what goes into none.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from vlp.data.further_members import Member, carried_of, number_of, of_tar
from vlp.data.rows import Shard, unread

LEFT_BEHIND = "left behind: "  # before the kind of a member that goes into no new shard


class Carried:
    """Of one tar; 32 bytes a member."""

    def __init__(self, path: Path, shard: Shard) -> None:
        """`shard`: as the tar was scanned."""
        self._path = path
        self._rows = np.zeros((0, 4), np.int64)  # key's number, offset, bytes, number of its ending
        self._endings: list[str] = []  # what follows the key: wav, audio.wav, 000.jpg
        # The members that no new shard holds, by kind.
        self.left_behind = unread(shard.left_out)
        # Most tars hold nothing of the kind, and are not walked a second time.
        if self.left_behind:
            self._walk()

    def _walk(self) -> None:
        numbers: dict[str, int] = {}
        rows: list[tuple[int, ...]] = []
        taken: Counter[str] = Counter()
        for key, of_sample in of_tar(self._path).members.items():
            for member in carried_of(of_sample):
                ending = member.ending[1:]
                number = numbers.setdefault(ending, len(numbers))
                rows.append((number_of(key), member.offset, member.size, number))
                taken[member.kind] += 1

        part = np.array(rows, np.int64).reshape(-1, 4)
        self._rows = part[np.argsort(part[:, 0], kind="stable")]
        self._endings = list(numbers)
        # Kinds beyond those that a shard counts apart are not among them.
        left = {kind: n - taken[kind] for kind, n in self.left_behind.items()}
        self.left_behind = {kind: n for kind, n in left.items() if n > 0}

    def of(self, key: str) -> dict[str, bytes]:
        """The members of a sample by what follows the key; ValueError where the tar grew
        shorter.
        """
        keys, number = self._rows[:, 0], number_of(key)
        first, last = (np.searchsorted(keys, number, side) for side in ("left", "right"))
        places = self._rows[first:last].tolist()
        if not places:
            return {}
        with open(self._path, "rb") as file:
            return {
                self._endings[ending]: Member("", "", offset, size).read(file)
                for _, offset, size, ending in places
            }

    def counts(self) -> dict[str, int]:
        """What is left behind, as tools count it."""
        return {f"{LEFT_BEHIND}{kind}": n for kind, n in self.left_behind.items()}
