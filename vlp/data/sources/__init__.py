"""Data sources, one a file. `Common` holds the keys that every source takes.

A source's file holds `Options` and `open(options: Options, captions: vlp.config.Captions) ->
Source`, which raises ValueError or OSError for data that cannot be trained on, saying what to
change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from vlp.data.wrong_captions import LISTS, read

if TYPE_CHECKING:
    import numpy as np

    from vlp.config import Captions, Members
    from vlp.data.embedded import Ensemble
    from vlp.data.modalities import Rows
    from vlp.data.sources._stored_members import Table
    from vlp.types import Sample


class StoreAway(RuntimeError):
    """A store that gave nothing for as long as it was to be waited for, or refuses the credentials.

    Not a bad sample: others of the store could not be had either.
    """


@dataclass(frozen=True)
class Contents:
    """What a source's shards hold, as a checkpoint keeps it to notice shards that changed."""

    names: Sequence[str] = ()  # of the shards
    digests: Sequence[str] = ()  # DIGITS letters each, or "-" that often where it is not known

    DIGITS: ClassVar[int] = 8

    def differing(self, joined: str) -> list[str]:
        """In words, which shards have other digests than those of a checkpoint, joined there."""
        # An index of the version before knows no digests, so nothing is said of its shards.
        before = [joined[i : i + self.DIGITS] for i in range(0, len(joined), self.DIGITS)]
        unknown = "-" * self.DIGITS

        changed = [
            name
            for name, old, new in zip(self.names, before, self.digests)
            if old != new and unknown not in (old, new)
        ]
        if not changed:
            return []

        listed = ", ".join(changed[:5]) + (", …" if len(changed) > 5 else "")
        return [f"{len(changed)} of {len(self.names)} shards hold other content now: {listed}"]


@dataclass(frozen=True)
class Common:
    """Keys of every source."""

    # Share of the samples drawn; None for all sources: every sample once an epoch.
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; expected a positive number")


class Source(Protocol):
    """Samples by number. It is sent to every loader process, so it holds no open files and few
    Python objects.

    A source inherits this protocol and overrides what it offers.
    """

    # Samples that exist but cannot be used (damaged, without text where those are dropped).
    n_left_out: int = 0
    n_negatives: int = 0  # most hard-negative captions of any caption
    n_counterfactuals: int = 0  # most counterfactual captions of any caption
    pictured: bool = False  # some sample has an image of a negative
    labels: frozenset[str] = frozenset()  # those of vlp.data.index.LABELS that every sample has
    embeddings: Ensemble | None = None  # of one teacher or several, of every sample
    other_pictures: bool = False  # the embeddings are of other pictures of the samples
    modalities: Mapping[str, Rows] = MappingProxyType({})  # further ones, by name
    of_texts: bool = False  # a query, a text, stands in the place of each picture
    # where the members of further modalities lie, by name, once `find_members` has looked
    members: Mapping[str, Table] = MappingProxyType({})
    window: int = 0  # shards that are fetched and shuffled together; 0: any order costs the same
    # > 0: a stream, asked in its own order; only its first `reserve` samples may be asked for at
    # any time
    reserve: int = 0
    runs: Any = None  # with a window: the samples of each shard, int64
    patience_s: float = 0.0  # how long a sample may be waited for, before StoreAway

    def __len__(self) -> int: ...

    def prepare(self, ids: np.ndarray) -> None:
        """Begin to fetch the shards of these samples, without waiting."""
        assert not self.window, "a source with a window fetches its shards"

    def check_room(self, n_shards: int) -> None:
        """Raise ValueError where `n_shards` at once, those that this machine reads, find no room
        here.
        """
        return

    def find_members(self, wanted: Mapping[str, Members]) -> None:
        """Look for the members that make modalities, by name, and fill in `members`; a source that
        cannot leaves it empty.
        """
        return

    def is_lost(self, i: int) -> bool:
        """Whether the shard of sample i could not be fetched lately."""
        return False

    def traffic(self) -> tuple[int, int]:
        """Bytes that this process fetched, and bytes of samples that it read, since the last
        call; for a source with a window.
        """
        return 0, 0

    def __getitem__(self, i: int) -> Sample:
        """Sample i with sample_id = i; raises OSError or ValueError where it cannot be read, and
        StoreAway where nothing of its source can.
        """
        ...

    def fingerprint(self) -> str:
        """Changes whenever number, order or place of the samples do; a resumed run compares it."""
        ...

    def earlier_fingerprint(self) -> str:
        """The fingerprint as checkpoints of earlier versions have it; may read the whole index."""
        return self.fingerprint()

    def contents(self) -> Contents:
        """What its shards hold; a source without shards, or of which nothing is known, says
        nothing.
        """
        return Contents()

    def problems(self) -> list[str]:
        """What was left out or odd, in words, as far as it was kept."""
        return []

    def note_wrong_captions(self, meta: dict[str, Any], captions: Sequence[str]) -> None:
        """Let `n_negatives` and `n_counterfactuals` learn of a sample with this JSON and these
        captions.
        """
        negatives, counterfactuals = (read(meta, field, captions).most(captions) for field in LISTS)
        self.n_negatives = max(self.n_negatives, negatives)
        self.n_counterfactuals = max(self.n_counterfactuals, counterfactuals)

    def n_captions(self) -> np.ndarray:
        """How many captions each sample has, whole numbers [n]."""
        raise ValueError(
            f"{type(self).__name__} does not know how many captions its samples have; "
            "pack it into shards"
        )

    def origins(self) -> np.ndarray:
        """The number of each sample's origin, int64 [n], never falling: variations of one origin
        follow one another.
        """
        raise ValueError(
            f"{type(self).__name__} does not know the origins of its samples; pack it into shards"
        )


def captions_of(
    captions: tuple[str, ...], meta: dict[str, Any], config: Captions
) -> tuple[str, ...]:
    """A sample's texts: its captions, else its class name in the configured templates, else
    nothing.
    """
    if captions or not config.class_templates:
        return captions

    name = meta.get("class")
    if not isinstance(name, str):
        return ()
    return tuple(template.replace("{}", name) for template in config.class_templates)


def check_roles(columns: Sequence[str], captions: Captions, name: str) -> None:
    """Refuse a table whose columns of captions are several and not as many as the roles."""
    if captions.roles and len(columns) > 1 and len(columns) != len(captions.roles):
        raise ValueError(
            f"{name}: captions stand in the columns {', '.join(columns)}, and data.captions.roles "
            f"is {captions.roles}; name a column of each role, in their order, with caption_columns"
        )
