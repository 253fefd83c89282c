"""What follows for the shards: samples with their neighbours as negatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data.wrong_captions import GIVEN
from vlp.data_tools._run.arrays import load
from vlp.data_tools._run.shards import Changed
from vlp.data_tools.mine.store import Store, digest
from vlp.data_tools.negatives.fields import with_negatives
from vlp.data_tools.negatives.rules import Negative

if TYPE_CHECKING:
    from vlp.data.members import Content

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
            meta = self._fields(sample, neighbours, scores, chosen["positive_scores"][row], counts)
            yield Changed(sample, list(sample.captions), meta)

    def _fields(
        self,
        sample: Content,
        neighbours: list[Content],
        scores: np.ndarray,
        positive_score: float,
        counts: Counter[str],
    ) -> dict[str, Any]:
        """The sample's JSON with its neighbours as negatives; their pictures go to the sample."""
        negatives = [(Negative(KIND, other.captions[0]), GIVEN) for other in neighbours]
        meta = with_negatives(sample.meta, negatives, counts)
        meta["negative_keys"] = [other.key for other in neighbours]
        meta["negative_scores"] = [round(float(score), _DIGITS) for score in scores]
        if not np.isnan(positive_score):
            meta["positive_score"] = round(float(positive_score), _DIGITS)
            if self.judged:
                meta["score"] = meta["positive_score"]

        sample.negative_images = {}
        if self.images:
            from vlp.data.members import Picture

            pictures = [Picture(other.image, other.image_type) for other in neighbours]
            sample.negative_images = dict(enumerate(pictures))
            counts["negative images written"] += len(pictures)
        return meta
