"""What follows for the shards: samples with their negatives, or the samples in a new order."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data.wrong_captions import GIVEN
from vlp.data_tools._run.shards import Changed, put
from vlp.data_tools.mine.store import Identities, Store, digest, identities, load
from vlp.data_tools.negatives.fields import with_negatives
from vlp.data_tools.negatives.rules import Negative

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.work import Result

KIND = "mined"
_DIGITS = 5  # of a score


@dataclass
class AddMined:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    store: Store
    folder: Path
    images: bool  # neighbours' pictures are packed as well
    judged: bool  # scores are a judge's

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        chosen = load(self.folder / f"{shard:05d}_chosen.npz")
        keys = load(self.folder / f"{shard:05d}_survey.npz")["rows"][:, 0]
        for row, sample in enumerate(samples):
            # Neighbours go by number: of a shard that was replaced meanwhile, to other samples.
            if row >= len(keys) or digest(sample.key) != keys[row]:
                raise ValueError(
                    f"shard {shard} of the source holds other samples than those that were "
                    "searched: it changed meanwhile; begin anew with another folder --to"
                )
            neighbours = [self.store.sample(n) for n in chosen["numbers"][row].tolist() if n >= 0]
            scores = chosen["scores"][row][: len(neighbours)]
            meta = self._fields(sample, neighbours, scores, chosen["own"][row], counts)
            yield Changed(sample, list(sample.captions), meta)

    def _fields(
        self,
        sample: Content,
        neighbours: list[Content],
        scores: np.ndarray,
        own: float,
        counts: Counter[str],
    ) -> dict[str, Any]:
        """The sample's JSON with its neighbours as negatives; their pictures go to the sample."""
        negatives = [(Negative(KIND, other.captions[0]), GIVEN) for other in neighbours]
        meta = with_negatives(sample.meta, negatives, counts)
        meta["negative_keys"] = [other.key for other in neighbours]
        meta["negative_scores"] = [round(float(score), _DIGITS) for score in scores]
        if not np.isnan(own):
            meta["positive_score"] = round(float(own), _DIGITS)
            if self.judged:
                meta["score"] = meta["positive_score"]

        sample.negative_images = {}
        if self.images:
            from vlp.data.members import Picture

            pictures = [Picture(other.image, other.image_type) for other in neighbours]
            sample.negative_images = dict(enumerate(pictures))
            counts["negative images written"] += len(pictures)
        return meta


def together(found: list[np.ndarray], size: int) -> tuple[np.ndarray, int]:
    """A new order of all samples in groups of `size`, of neighbours as far as there are any left;
    returns (the samples' numbers, how many of them stand beside no neighbour).

    `found`: the neighbours of each sample, by falling score. The samples take their turns in
    order: each that is in no group opens one with its nearest that are in none, at first those
    that it is a neighbour of as well. Who finds too few waits, and the last groups are made of
    those in order.
    """
    is_free = np.ones(len(found), bool)
    neighbours = [set(numbers.tolist()) for numbers in found]
    order: list[int] = []
    waiting: list[int] = []
    for number, nearest in enumerate(found):
        if not is_free[number]:
            continue
        free = [other for other in nearest.tolist() if is_free[other]]
        # A stable sort: among mutual neighbours, and among the others, the nearest first.
        free.sort(key=lambda other: number not in neighbours[other])
        group = [number, *free[: size - 1]]
        if len(group) < size:
            waiting.append(number)
            continue
        is_free[group] = False
        order += group

    alone = [number for number in waiting if is_free[number]]
    return np.array(order + alone, np.int64), len(alone)


@dataclass
class WriteOrder:
    """The work on one new shard: the samples of some groups, each of an origin of its own."""

    store: Store
    folder: Path
    size: int

    def __call__(self, job: tuple[int, int, np.ndarray]) -> Result:
        from vlp.data.format import ShardWriter
        from vlp.data_tools._belonging import settle

        shard, first_group, numbers = job
        counts: Counter[str] = Counter()
        with ShardWriter(
            self.folder, sys.maxsize, first_shard=shard, overwrite=True, indexed=False
        ) as writer:
            for place, number in enumerate(numbers.tolist()):
                sample = self.store.sample(number)
                counts["samples read"] += 1
                settle(sample, counts)

                meta = sample.meta | {"source_key": sample.key}
                if "origin" in sample.meta:
                    meta["source_origin"] = sample.meta["origin"]
                meta["origin"] = f"{KIND}-{first_group + place // self.size}"
                put(writer, Changed(sample, list(sample.captions), meta), None)
                counts["samples written"] += 1
        return {"counts": counts}


def known(folder: Path, store: Store) -> Identities:
    """What identifies the samples."""
    return identities(folder, len(store.paths))
