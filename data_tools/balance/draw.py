"""How often each query occurs, and which samples are drawn.

A query is counted once a sample, whichever of the captions hold it. With a cap t, a query of count
c keeps a sample with probability min(1, t/c); a sample stays if one of its queries keeps it
(MetaCLIP, arXiv 2309.16671, algorithm 1). So the tail (c <= t) stays as a whole, and of the head
about t samples a query, and more where they hold other queries.

Whether a query keeps a sample is a number in [0, 1) made of (seed, the sample's key, the query's
text), compared with the probability: it depends neither on the order of samples and queries, nor on
who computes it.

    DIR/00000_matches.npz    queries [matches], n_matches [samples] and keys [samples] (64 bits of
                             each) of a shard; the queries that occur and how often: counted, times
    DIR/00000_kept.npz       kept [samples]; the queries among them and how often: counted, times
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlp.data_tools._run.arrays import load, load_all, save
from vlp.data_tools.balance.queries import Queries, hash_of

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.shards import Changed
    from vlp.data_tools._run.work import Result

# Of splitmix64's finaliser: each bit that goes in changes about half of those that come out.
_SHIFTS = (30, 27, 31)
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 1)


@dataclass(frozen=True)
class Match:
    """The work on one shard: which queries its samples hold."""

    folder: Path
    queries: Queries

    def __call__(self, job: tuple[int, Path]) -> Result:
        from vlp.data_tools._run.shards import samples

        number, path = job
        counts: Counter[str] = Counter()
        matches: list[int] = []
        n_matches: list[int] = []
        keys: list[int] = []
        for sample in samples(path, counts):
            of_sample: set[int] = set()
            for caption in sample.captions:
                of_sample |= self.queries.held_by(caption)
            matches += sorted(of_sample)
            n_matches.append(len(of_sample))
            keys.append(hash_of(sample.key))

        save(
            matches_file(self.folder, number),
            queries=np.array(matches, np.int32),
            n_matches=np.array(n_matches, np.int64),
            keys=np.array(keys, np.uint64),
            **_counted(np.array(matches, np.int32)),
        )
        counts["samples that hold a query"] += int(np.count_nonzero(n_matches))
        return {"counts": counts}


@dataclass(frozen=True)
class Draw:
    """The work on one shard: which of its samples stay."""

    folder: Path
    seed: int
    hashes: np.ndarray  # uint64 [queries]
    probabilities: np.ndarray  # float64 [queries]

    def __call__(self, job: tuple[int, Path]) -> Result:
        number, _ = job
        matched = load(matches_file(self.folder, number))
        queries, n_matches = matched["queries"], matched["n_matches"]
        sample_of = np.repeat(np.arange(len(n_matches)), n_matches)

        probabilities = self.probabilities[queries]
        drawn = uniform(self.seed, matched["keys"][sample_of], self.hashes[queries])
        kept = np.zeros(len(n_matches), bool)
        kept[sample_of[drawn < probabilities]] = True

        # What was to be expected: 1 − Π (1 − p) a sample.
        missed = np.ones(len(n_matches))
        np.multiply.at(missed, sample_of, 1 - probabilities)
        save(kept_file(self.folder, number), kept=kept, **_counted(queries[kept[sample_of]]))
        return {
            "counts": {"samples read": len(kept), "samples kept": int(kept.sum())},
            "expected": float((1 - missed).sum()),
            "variance": float((missed * (1 - missed)).sum()),
        }


@dataclass(frozen=True)
class KeepDrawn:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    folder: Path

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        kept = load(kept_file(self.folder, shard))["kept"]
        n_matches = load(matches_file(self.folder, shard))["n_matches"]
        for place, sample in enumerate(samples):
            if place >= len(kept):
                raise ValueError(
                    f"shard {shard} of the source changed since its captions were counted; name "
                    "another folder with --to"
                )
            if kept[place]:
                yield Changed(sample, list(sample.captions), sample.meta)
            elif n_matches[place]:
                counts["dropped: above the cap of each of its queries"] += 1
            else:
                counts["dropped: holds no query"] += 1


def uniform(seed: int, keys: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 [n], of samples' keys and queries' hashes, uint64 [n]."""
    of_samples = _mixed(keys + np.uint64(hash_of(f"balance:{seed}")))
    mixed = _mixed(of_samples + queries)
    return (mixed >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(multiplier)
    return values


def totals(files: Iterable[Path], n_queries: int) -> np.ndarray:
    """How often each query occurs in all shards of these files, int64 [queries]."""
    total = np.zeros(n_queries, np.int64)
    for counted in load_all(files):
        total[counted["counted"]] += counted["times"]
    return total


def _counted(queries: np.ndarray) -> dict[str, np.ndarray]:
    """The queries that occur, and how often: a shard holds few of all."""
    counted, times = np.unique(queries, return_counts=True)
    return {"counted": counted, "times": times}


def matches_file(folder: Path, number: int) -> Path:
    """Where a shard's matches lie."""
    return folder / f"{number:05d}_matches.npz"


def kept_file(folder: Path, number: int) -> Path:
    """Where it lies which of a shard's samples stay."""
    return folder / f"{number:05d}_kept.npz"
