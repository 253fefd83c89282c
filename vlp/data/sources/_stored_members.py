"""The members of samples that make modalities, found one sample at a time by what
`vlp.data.member_file` says of their tars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from vlp import config, log
from vlp.data.further_members import Member
from vlp.data.index_file import opened
from vlp.data.member_file import (
    MEMBER,
    OfShard,
    is_of_modality,
    kinds_of,
    members_of_key,
    of_shard,
    open_members,
)
from vlp.data.rows import Shard, Stored
from vlp.data.sources._stored_rows import Bodies


class StoredMembers(Bodies):
    """Where the further members of all samples of some shards lie."""

    def __init__(self, of_shards: Sequence[OfShard | None]) -> None:
        super().__init__([None if one is None else one.stored for one in of_shards])

    def members(self, s: int, path: str, key: str) -> np.ndarray:
        """Those of the sample `key` of shard s, whose tar is at `path`, [m] MEMBER."""
        if not self._places[s, 2]:
            return np.zeros(0, MEMBER)
        stored = self._stored(s)
        try:
            file = opened(stored.path, stored.head)
            return members_of_key(lambda at, n: file.read(stored.offset + at, n), key)
        except (OSError, ValueError):
            body = self.body(s, path)
        return members_of_key(lambda at, n: body[at : at + n], key)

    def _lying_in(self, path: str, inode: int, mtime_ns: int) -> dict[str, Stored]:
        return _by_digest(path, inode, mtime_ns)

    def _make(self, path: str) -> bytes:
        return of_shard(Path(path), Shard("", 0, 0)).body


class Table:
    """The members that make one modality. Sent to every loader process."""

    def __init__(
        self, members: config.Members, of_shards: Sequence[OfShard | None], stored: StoredMembers
    ) -> None:
        self.members = members
        self.extensions: set[str] = set()
        self.n_samples = 0  # that have it
        self._stored = stored
        for one in of_shards:
            if one is None:
                continue
            counts = one.counted(members)
            self.extensions.update(counts)
            is_video = isinstance(members, config.Frames)
            self.n_samples += one.n_with_frames if is_video else sum(counts.values())

    @property
    def kinds(self) -> set[str]:
        """Of `Shard.left_out`."""
        return kinds_of(self.members, self.extensions)

    def places(self, shard: int, path: str, key: str) -> list[Member]:
        """The members of the sample `key` of the tar number `shard`, which lies at `path`."""
        chosen = is_of_modality(self.members, self._stored.members(shard, path, key))
        places = zip(chosen["offset"].tolist(), chosen["size"].tolist(), strict=True)
        return [Member("", "", offset, size) for offset, size in places]


def tables(
    paths: Sequence[str],
    of_shards: Sequence[OfShard | None],
    wanted: Mapping[str, config.Members],
) -> dict[str, Table]:
    """A table of each modality, by name; warns of what damage to a tar hides."""
    for path, one in zip(paths, of_shards, strict=True):
        if one is not None and one.damage:
            log.warn(
                f"{path}: {', '.join(wanted)} of the samples after damage is lacking "
                f"({one.damage}); restore the shard"
            )
    stored = StoredMembers(of_shards)
    return {name: Table(members, of_shards, stored) for name, members in wanted.items()}


@lru_cache(maxsize=2)
def _by_digest(path: str, inode: int, mtime_ns: int) -> dict[str, Stored]:
    shards = open_members(Path(path)).values()
    return {shard.stored.digest: shard.stored for shard in shards if shard.stored is not None}
