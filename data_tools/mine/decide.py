"""The work on one shard after the search: filters, the judge, and the choice, in a file beside the
mark.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data_tools._run.arrays import load, save
from vlp.data_tools._run.kept import Kept
from vlp.data_tools.mine.judge import Pair
from vlp.data_tools.mine.judge import scores as scores_of
from vlp.data_tools.mine.rules import Neighbours, Rules, choose, in_window
from vlp.data_tools.mine.store import Identities, Store, identities
from vlp.judges import Judge

if TYPE_CHECKING:
    from vlp.data_tools._run.work import Result


@dataclass
class Decide:
    """What is taken for each sample of a shard. `delta`: a neighbour that the judge scores above
    the sample's own score less `delta` is true of the picture.
    """

    store: Store
    folder: Path
    rules: Rules
    searched: str  # the side that was searched: "text" or "image"
    judge: Judge | None = None
    delta: float = 0.1

    def __call__(self, job: tuple[int, Path]) -> Result:
        shard, _ = job
        counts: Counter[str] = Counter()
        first = self.store.first(shard)
        neighbours = read_neighbours(self.folder, shard)
        known = _identities(self.folder, len(self.store.paths))
        window = in_window(neighbours, first, self.rules, known, counts)

        scores, positive_scores = neighbours.scores, neighbours.positive_scores
        if self.judge is not None:
            scores, positive_scores = self._judged(shard, neighbours, window, counts)
            window &= self._wrong(scores, positive_scores, window, counts)
        places = choose(neighbours, window, first, self.rules, known)

        rows = np.arange(len(places))[:, None]
        numbers = np.where(places >= 0, neighbours.numbers[rows, places], -1)
        save(
            self.folder / f"{shard:05d}_chosen.npz",
            numbers=numbers,
            scores=np.where(places >= 0, scores[rows, places], np.nan),
            positive_scores=positive_scores,
        )
        counts["samples read"] = len(numbers)
        counts["neighbours taken"] = int((numbers >= 0).sum())
        return {"counts": counts}

    def _judged(
        self, shard: int, neighbours: Neighbours, window: np.ndarray, counts: Counter[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The judge's scores [n, N] of the window's neighbours and [n] of the samples' own pairs;
        NaN where there is none.
        """
        judge, first = self.judge, self.store.first(shard)
        assert judge is not None
        rows = np.flatnonzero(window.any(1)).tolist()
        pairs = [f"{first + row}:{first + row}" for row in rows]
        cells = np.argwhere(window).tolist()
        pairs += [f"{first + row}:{neighbours.numbers[row, place]}" for row, place in cells]

        kept = Kept(self.folder / "_judged" / f"{shard:05d}.jsonl")
        # A sample's own pair beside those of its neighbours: its picture is read once.
        in_order = sorted(set(pairs), key=lambda pair: [int(n) for n in pair.split(":")])
        kept.complete(in_order, judge.batch, lambda batch: scores_of(judge, self._pairs(batch)))

        positive_scores = np.full(len(window), np.nan)
        scores = np.full(window.shape, np.nan)
        for row in rows:
            positive_scores[row] = _number(kept.values[f"{first + row}:{first + row}"])
        for row, place in cells:
            pair = f"{first + row}:{neighbours.numbers[row, place]}"
            scores[row, place] = _number(kept.values[pair])
        counts["pairs judged"] = len(in_order)
        return scores, positive_scores

    def _pairs(self, batch: list[str]) -> list[Pair]:
        """What is judged: the sample's picture with a neighbour's caption, or the other way round
        where pictures were searched.
        """
        pairs = []
        for numbers in batch:
            query, neighbour = map(int, numbers.split(":"))
            pictured, told = query, neighbour
            if self.searched == "image":
                pictured, told = neighbour, query
            captions = self.store.sample(told).captions
            pairs.append(Pair(self.store.sample(pictured).image, captions[0] if captions else ""))
        return pairs

    def _wrong(
        self,
        scores: np.ndarray,
        positive_scores: np.ndarray,
        window: np.ndarray,
        counts: Counter[str],
    ) -> np.ndarray:
        """Which of the window's neighbours the judge calls wrong."""
        left = window.copy()
        for reason, is_against in (
            ("neither yes nor no to the sample's own pair", np.isnan(positive_scores)[:, None]),
            ("neither yes nor no", np.isnan(scores)),
            ("true of the picture", scores > positive_scores[:, None] - self.delta),
        ):
            counts[f"dropped: judge: {reason}"] += int((left & is_against).sum())
            left &= ~is_against
        return left


def read_neighbours(folder: Path, shard: int) -> Neighbours:
    """What the search neighbours for a shard."""
    return Neighbours(**load(folder / f"{shard:05d}_neighbours.npz"))


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


@lru_cache(maxsize=1)
def _identities(folder: Path, n_shards: int) -> Identities:
    return identities(folder, n_shards)
