"""Which neighbours may be negatives, and which of those are taken."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlp.data_tools.mine.store import NOTHING, Identities
from vlp.seeds import derive

Choice = Literal["top", "uniform", "softmax"]


@dataclass(frozen=True)
class Rules:
    """The filters, in the order in which they are applied, and the choice from what they leave."""

    max_ratio: float = 0.95  # of the sample's own score, which a neighbour's must stay below
    margin: float | None = None  # instead: above the sample's own score
    same: float = 0.98  # cosine of two captions that say the same
    skip: int = 0  # nearest of those left
    window: int = 16  # how many of those left are chosen from
    k: int = 4
    choice: Choice = "top"
    temperature: float = 0.05  # of softmax
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k < 1 or self.skip < 0 or self.window < self.k or self.temperature <= 0:
            raise ValueError(
                f"found k {self.k}, skip {self.skip}, window {self.window}, temperature "
                f"{self.temperature:g}; expected k >= 1, skip >= 0, window >= k, temperature > 0"
            )


@dataclass(frozen=True)
class Neighbours:
    """What was found for the samples of a shard, by falling score."""

    numbers: np.ndarray  # [n, N] of the neighbours; −1: none
    scores: np.ndarray  # [n, N] their cosines with the query
    positive_scores: np.ndarray  # [n] the sample's own
    caption_cosines: np.ndarray  # [n, N] cosines of the two captions


def in_window(
    neighbours: Neighbours, first: int, rules: Rules, identities: Identities, counts: Counter[str]
) -> np.ndarray:
    """Which neighbours are left to choose from, bool [n, N]; the others are counted by the first
    reason against each.
    """
    left = neighbours.numbers >= 0
    for reason, is_against in _reasons(neighbours, first, rules, identities):
        counts[f"dropped: {reason}"] += int((left & is_against).sum())
        left &= ~is_against

    # By rank among those that are left.
    rank = left.cumsum(1) - 1
    is_skipped = left & (rank < rules.skip)
    counts["dropped: among the nearest that are skipped"] += int(is_skipped.sum())
    return left & ~is_skipped & (rank < rules.skip + rules.window)


def _reasons(
    neighbours: Neighbours, first: int, rules: Rules, identities: Identities
) -> list[tuple[str, np.ndarray]]:
    """(reason, where it speaks against a neighbour), in order."""
    of_rows = first + np.arange(len(neighbours.positive_scores))
    numbers = np.maximum(neighbours.numbers, 0)

    same_key = identities.keys[numbers] == identities.keys[of_rows, None]
    origins = identities.origins[of_rows, None]
    same_origin = (identities.origins[numbers] == origins) & (origins != NOTHING)

    captions = identities.firsts[numbers]
    same_caption = np.zeros_like(same_key)
    for row, number in enumerate(of_rows.tolist()):
        same_caption[row] = np.isin(captions[row], identities.captions_of(number))

    # Below zero a share of the positive's score would lie above it.
    positive = neighbours.positive_scores[:, None]
    limit = positive - (1 - rules.max_ratio) * np.abs(positive)
    high, by = neighbours.scores >= limit, f"at least {rules.max_ratio:g} of its own score"
    if rules.margin is not None:
        high, by = neighbours.scores >= positive + rules.margin, f"its own score + {rules.margin:g}"

    return [
        ("the same key or origin", same_key | same_origin),
        ("no caption", captions == NOTHING),
        ("a caption of the sample", same_caption),
        (by, high),
        (
            f"another wording (cosine of captions >= {rules.same:g})",
            neighbours.caption_cosines >= rules.same,
        ),
    ]


def choose(
    neighbours: Neighbours, window: np.ndarray, first: int, rules: Rules, identities: Identities
) -> np.ndarray:
    """The places of the chosen neighbours of each sample, int64 [n, K] by falling score; −1: no
    more. Drawn by the seed and the sample's key.
    """
    chosen = np.full((len(window), rules.k), -1, np.int64)
    for row in range(len(window)):
        places = np.flatnonzero(window[row])
        if rules.choice != "top" and len(places) > rules.k:
            key = int(identities.keys[first + row])
            rng = np.random.default_rng(derive(rules.seed, "mine", key))
            places = np.sort(_drawn(places, neighbours.scores[row], rules, rng))
        places = places[: rules.k]
        chosen[row, : len(places)] = places
    return chosen


def _drawn(
    places: np.ndarray, scores: np.ndarray, rules: Rules, rng: np.random.Generator
) -> np.ndarray:
    """K of the places without replacement."""
    # The largest of logits with Gumbel noise are a draw from their softmax.
    logits = np.zeros(len(places))
    if rules.choice == "softmax":
        logits = scores[places] / rules.temperature
    noisy = logits + rng.gumbel(size=len(places))
    return places[np.argsort(-noisy, kind="stable")[: rules.k]]
