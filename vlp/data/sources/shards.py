"""Local shards: `{name: shards, path: data/train}` or `path: "a/{00000..00041}.tar::b"`.

A path is a folder (all its tars in order of name), a tar, or a pattern with braces or stars; `::`
joins several. Each sample is one positioned read of the span that the folder's index names (or
several, where its members are scattered over the tar), so any order costs the same and workers
share nothing. `captions` chooses among the texts that samples have: `captions: [re_caption, txt]`,
or with shares `{re_caption: 0.75, txt: 0.25}`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from vlp.config import Captions, Members
from vlp.data import looks, member_index, splits, stores
from vlp.data.captions import USUAL, Choice, Texts, listed
from vlp.data.embedded import Embeddings, Ensemble, Stored
from vlp.data.further_members import Files
from vlp.data.index import located
from vlp.data.member_file import OfShard
from vlp.data.members import open_sample
from vlp.data.modalities import Rows
from vlp.data.modalities import Stored as StoredModalities
from vlp.data.rows import CONTINUES, Shard, said
from vlp.data.sources import Contents, Source, captions_of
from vlp.data.sources._stored_members import tables
from vlp.data.sources._stored_rows import StoredRows
from vlp.data.sources._table import (
    Kinds,
    Table,
    earlier_fingerprint,
    fingerprint,
    kinds_of,
    table_of,
)
from vlp.data.stored import source
from vlp.data.without_text import columns_beside, other_names, unread_texts
from vlp.privacy import address
from vlp.types import Sample


@dataclass(frozen=True)
class Options(Texts):
    """Where the shards are, and which of their texts are captions."""

    path: str  # folder, tar, braces or stars, several joined by ::
    # Folder that `vlp data embed` made from these shards: a teacher's embeddings; or those of
    # several teachers.
    embeddings: str | list[str] | None = None
    # The embeddings are of other pictures of the samples, which lie in shards of the same names
    # with the same keys: what a teacher saw in colour, where this source has the depth
    other_pictures: bool = False
    # Folders of further modalities that `vlp data modality` made from these shards, by name
    modalities: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.folders)) < len(self.folders) or self.embeddings == []:
            raise ValueError(
                f"embeddings is {self.embeddings}; name a folder, several different ones, or null "
                "for none"
            )
        if self.other_pictures and not self.folders:
            raise ValueError(
                "other_pictures is of embeddings, and there are none; name their folder, or leave "
                "it out"
            )

    @property
    def folders(self) -> list[str]:
        """The folders of all teachers' embeddings."""
        if self.embeddings is None:
            return []
        return [self.embeddings] if isinstance(self.embeddings, str) else self.embeddings


def open(options: Options, captions: Captions) -> Shards:
    """Index the shards, from the folder's index where it is current; raises ValueError, OSError."""
    remote = [
        part
        for part in options.path.split("::")
        if stores.is_address(part) and not part.startswith("file://")
    ]
    if remote:
        raise ValueError(
            f"{address(remote[0])} lies in a store; training reads it as "
            "{name: remote, path: …}, which fetches shards ahead of their use"
        )
    paths, shards = looks.at(options.path)
    _refuse_splits(options.path, paths)
    return _of_options(paths, shards, captions, options)


def opened(paths: list[Path], options: Options, captions: Captions) -> Shards:
    """The shards at `paths`, wherever they lie; raises ValueError, OSError."""
    return _of_options(paths, located(paths), captions, options)


def _of_options(
    paths: list[Path], shards: list[Shard], captions: Captions, options: Options
) -> Shards:
    of_shards = Shards(paths, shards, captions, options, options.folders, options.modalities)
    of_shards.other_pictures = options.other_pictures
    return of_shards


def _refuse_splits(path: str, shards: list[Path]) -> None:
    """Raise where a folder holds shards of several splits: training would see those for testing."""
    names = sorted({splits.of_file(shard.name) for shard in shards} - {""})
    if len(names) > 1 and Path(path).expanduser().is_dir():
        raise ValueError(
            f"{path} holds shards of several splits: {', '.join(names)}; name one of them, such as "
            f"{path}/{names[-1]}*.tar, or all: {path}/*.tar"
        )


class Shards(Source):
    """Random access to the samples of some tars."""

    def __init__(
        self,
        paths: list[Path] | list[str],
        shards: list[Shard],
        captions: Captions,
        texts: Texts,
        embeddings: Sequence[str] = (),
        modalities: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`shards`: as `vlp.data.index.located` gives them; their rows stay unread."""
        self.paths = [str(path) for path in paths]
        self.captions = captions
        self.choice = Choice.of(texts, captions)

        # Of samples, texts and members, by what they are.
        self.left_out: Counter[str] = Counter()
        for shard in shards:
            self.left_out.update(shard.left_out)
        self._problems: list[str] = []
        if self.left_out:
            self._problems.append(self._passed_over())

        if not any(shard.count for shard in shards):
            of_shards = chain.from_iterable(shard.problems for shard in shards)
            problems = [*self._problems, *of_shards]
            raise ValueError(self._unusable(problems, "no members that form samples"))
        kinds = kinds_of(shards, self.choice, with_class=bool(captions.class_templates))
        self.names = kinds.names  # how many samples have a text under each name
        self._note_texts(kinds, shards)

        # Without a text a sample is left out, or the whole source refused.
        n_without = int(kinds.n_without.sum())
        self.n_left_out = sum(shard.n_left_out for shard in shards) + n_without
        if n_without:
            self._refuse_or_note(kinds)
        if not kinds.n.any():
            raise ValueError(self._unusable(self._problems, ""))

        # What the samples offer besides picture and caption.
        self.n_negatives = kinds.n_negatives
        self.n_counterfactuals = kinds.n_counterfactuals
        self.labels = kinds.labels
        self.pictured = kinds.pictured

        # What a resumed run compares.
        self._digest = fingerprint(shards, self.choice, kinds.n)
        # One text of all, because it is sent to every loader process.
        unknown = "-" * Contents.DIGITS
        self._contents = "".join((shard.content or unknown)[: Contents.DIGITS] for shard in shards)

        self.n_bytes_read = 0  # of samples, by this process
        self._kinds = kinds
        self._shards = shards
        self._rows = StoredRows(shards, kinds.n, kinds.left_out)
        if embeddings:
            self._embed(embeddings)
        self.modalities = {
            name: Rows(folder, self.paths, shards) for name, folder in modalities.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        # Loader processes read samples; what all of them are like is asked for before they start.
        return {**self.__dict__, "_shards": None, "_kinds": None, "n_bytes_read": 0}

    def _unusable(self, problems: list[str], otherwise: str) -> str:
        return f"{self._name()} holds no usable sample: {'; '.join(problems[:3]) or otherwise}"

    def _note_texts(self, kinds: Kinds, shards: list[Shard]) -> None:
        """Note what is odd about the texts, and about the shards; ValueError for a name that no
        sample has.
        """
        name = self._name()
        n_samples = int(kinds.n.sum() + kinds.n_without.sum())
        self._problems += self.choice.check(self.names, n_samples, name)

        if kinds.stand_ins:
            self._problems.append(
                f"{name}: there is no {', '.join(USUAL)}: captions are taken from the field "
                f"{listed(kinds.stand_ins)}; the source's captions names others"
            )
        if kinds.n_several:
            self._problems.append(
                f"{name}: text files of several lines are one caption each in "
                f"{kinds.n_several:,} samples; the source's lines: each makes each line a caption"
            )

        # Of local shards an old index is made anew, so these are remote.
        n_undigested = sum(not shard.content for shard in shards)
        if n_undigested:
            self._problems.append(
                f"{name}: the index of {n_undigested} shards is of an older version, without "
                "digests: their samples are read unchecked; where they are local, opening them "
                "writes a new one"
            )

        for path, shard in zip(self.paths, shards):
            self._problems += [f"{path}: {text}" for text in shard.problems]

    def _embed(self, folders: Sequence[str]) -> None:
        """Add teachers' embeddings of the samples."""
        # Its texts are those that stand first, so they serve only where training takes the first.
        takes_first = self.captions.choose == "first" or self._kinds.one_text_each
        with_text = self.choice == Choice() and not self._kinds.some_without and takes_first
        members = [Embeddings(folder, self.paths, self._shards, with_text) for folder in folders]
        self.embeddings = Ensemble(members)

        for member in members:
            if not member.with_text:
                self._problems.append(
                    f"{member.folder}: teacher_text is left out, because it is of first captions "
                    "and training also takes others; embed those too (`vlp data embed` with "
                    "--captions), or set captions.choose=first, and no class_templates, lines or "
                    "captions of the source"
                )

    def _name(self) -> str:
        return self.paths[0] + ("…" if len(self.paths) > 1 else "")

    def _refuse_or_note(self, kinds: Kinds) -> None:
        """Refuse samples without a text, or note how many there are in each shard."""
        per_shard = kinds.n_without
        n_without = int(per_shard.sum())
        lines = [
            f"{self.paths[s]}: {per_shard[s]} samples without text"
            for s in np.flatnonzero(per_shard)
        ]

        # To leave samples out is a choice of the user's: a misspelt name would leave out most.
        if self.captions.missing == "error":
            n_samples = n_without + int(kinds.n.sum())
            raise ValueError(
                f"{n_without} of {n_samples} samples have no caption under "
                f"{' or '.join(self.choice.names or USUAL)} ({'; '.join(lines[:3])}). "
                f"{other_names(self.names)}Set captions.class_templates to make captions of class "
                "names, or captions.missing=drop to leave the samples out"
                f"{unread_texts(self.left_out, self._problems)}{columns_beside(self.paths)}"
            )
        self._problems += lines

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        return self.sample(i, self.paths[self.shard_of(i)])

    def shard_of(self, i: int) -> int:
        """The position in `paths` of the shard that holds sample i."""
        return self._rows.shard_of(i)

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """The positions in `paths` of the shards that hold these samples."""
        return self._rows.shards_of(samples)

    def sample(self, i: int, path: str) -> Sample:
        """Sample i, read from `path`, a copy of its shard."""
        places, digest = self._rows.members(i, path)
        tar = _Handle(path)
        stored = b"".join(tar.read(*place) for place in places)
        self.n_bytes_read += len(stored)
        # The digest tells a shard that changed since, and a damaged one.
        content = open_sample(stored, digest)

        own_captions = self.choice.captions(content.meta, content.text)
        captions = captions_of(own_captions, content.meta, self.captions)
        if not captions:
            # An index of an earlier version counted every text file.
            reason = "; ".join(content.spare) or "the shard changed after it was indexed"
            raise ValueError(
                f"{path}: {content.key!r} has no caption any more ({reason}); remove the index "
                "beside the shard, and it is read anew"
            )

        return Sample(
            i,
            content.key,
            content.image,
            content.image_type,
            captions,
            content.meta,
            {place: picture.data for place, picture in content.negative_images.items()},
            self._embeddings_of(i, path, content.key),
            self.choice.weights(content.meta, content.text),
            self.choice.roles_of(content.meta, content.text),
            self._modalities_of(i, path),
            self._members_of(i, tar, content.key, places),
        )

    def find_members(self, wanted: Mapping[str, Members]) -> None:
        paths = [Path(path) for path in self.paths]
        self.use_members(wanted, member_index.located(paths, self.indexed()))

    def indexed(self) -> list[Shard]:
        """What the index says of each shard; asked before the source is sent to other processes."""
        assert self._shards is not None, "loader processes read samples alone"
        return self._shards

    def use_members(
        self, wanted: Mapping[str, Members], of_shards: Sequence[OfShard | None]
    ) -> None:
        """Fill in `members`, of what is known of each shard's."""
        self.members = tables(self.paths, of_shards, wanted)
        self.take_back(frozenset().union(*(table.kinds for table in self.members.values())))

    def take_back(self, kinds: Set[str]) -> None:
        """Tell no longer that members of these kinds are passed over."""
        read = kinds & self.left_out.keys()
        if not read:
            return
        self._problems.remove(self._passed_over())
        for kind in read:
            del self.left_out[kind]
        if self.left_out:
            self._problems.insert(0, self._passed_over())

    def _passed_over(self) -> str:
        return f"{self._name()}: odd or passed over: {said(self.left_out)}"

    def _members_of(
        self, i: int, tar: _Handle, key: str, read: Sequence[tuple[int, int]]
    ) -> dict[str, Files]:
        """The members of sample i that make further modalities. `read`: what was read of its tar,
        (offset, bytes), for the count of bytes that samples take.
        """
        if not self.members:
            return {}
        shard, files = self.shard_of(i), {}
        for name, table in self.members.items():
            members = table.places(shard, tar.path, key)
            files[name] = Files(tar.path, members, tar.read)
            for member in members:
                is_read = any(start <= member.offset < start + n for start, n in read)
                self.n_bytes_read += 0 if is_read else member.size
        return files

    def _modalities_of(self, i: int, path: str) -> StoredModalities | None:
        """The further modalities of sample i."""
        if not self.modalities:
            return None
        place = self._rows.row_number(i, path)
        return StoredModalities(self.modalities, self.shard_of(i), place)

    def _embeddings_of(self, i: int, path: str, key: str) -> Stored | None:
        """The teachers' embeddings of sample i, of which the others tell in errors; None without a
        teacher.
        """
        if self.embeddings is None:
            return None
        stored = Stored(self.embeddings, self.shard_of(i), self._rows.row_number(i, path))

        # `vlp data embed` writes zeros for pictures that do not open.
        if not np.atleast_2d(stored.image()).any(1).all():
            raise ValueError(
                f"{path}: {key!r} has no image embedding: its picture did not open for `vlp data "
                "embed`"
            )
        return stored

    def counts(self) -> np.ndarray:
        """Usable samples of each shard, int64."""
        return self._rows.counts()

    def n_captions(self) -> np.ndarray:
        # In few bytes each: of all samples of a run there are many.
        parts = []
        for table in self._tables():
            counts = np.where(table.n_texts > 0, table.n_texts, len(self.captions.class_templates))
            parts.append(counts.astype(np.min_scalar_type(int(counts.max(initial=0)))))
        return np.concatenate(parts)

    def origins(self) -> np.ndarray:
        begins = [~table.has(CONTINUES) for table in self._tables()]
        return np.cumsum(np.concatenate(begins))

    def _tables(self) -> Iterator[Table]:
        """The usable samples of each shard, read one shard at a time."""
        for s, (path, shard) in enumerate(zip(self.paths, self.indexed())):
            without = self._kinds.left_out.get(s, frozenset())
            yield table_of(self._rows.body(s, path), shard, self.choice, without)

    def fingerprint(self) -> str:
        return self._digest

    def earlier_fingerprint(self) -> str:
        return earlier_fingerprint(self._tables, self._shards, self.choice)

    def contents(self) -> Contents:
        names = [Path(path).name for path in self.paths]
        digits = Contents.DIGITS
        starts = range(0, len(self._contents), digits)
        digests = [self._contents[start : start + digits] for start in starts]
        return Contents(names, digests)

    def problems(self) -> list[str]:
        return self._problems


@lru_cache(maxsize=128)  # a process keeps this many shards open; the limit is commonly 1,024
class _Handle:
    """An open file that closes when it falls out of the cache."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(source(path), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # opening may have failed
            os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of a shard at a position; a shard that grew shorter is a ValueError."""
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise ValueError(
                f"{self.path} ends before byte {offset + length}; it changed after it was indexed"
            )
        return data
