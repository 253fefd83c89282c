"""Who stays, decided from the pairs of near samples, in the order of the samples.

The rule is that of `vlp.data_tools.dedup.near.decide`: a sample is dropped if and only if it is a
copy of one that stays before it. Samples without a pair stay, and take no memory here: about 100
bytes for each of the others, and 50 for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# A dropped sample, the one that it is a copy of, and their cosine: nan where the hash told.
DROPPED = np.dtype([("sample", "<i8"), ("copy_of", "<i8"), ("cosine", "<f4")])
# Two samples of similar embeddings.
SIMILAR = np.dtype([("earlier", "<i8"), ("later", "<i8"), ("cosine", "<f4")])


@dataclass(frozen=True)
class Copies:
    """Everything that was found."""

    members: np.ndarray  # [m, 2] the first sample of a fingerprint, a further one
    near: np.ndarray  # PAIR of fingerprints, by their first samples
    similar: np.ndarray  # SIMILAR


def decide(copies: Copies, n_fixed: int, keep_copies: bool) -> np.ndarray:
    """DROPPED samples, in order. The first `n_fixed` samples stay whatever they are, and only of
    them copies are dropped with `keep_copies`.
    """
    involved = _involved(copies)
    group = _groups(copies.members, involved)
    near = _near(copies.near, involved)
    similar, cosines = _similar(copies.similar, involved)

    # The first sample of each group that stays; -1: none so far. One by one, because what a sample
    # is compared with depends on what was decided before it.
    first = np.full(len(involved), -1).data
    stays = np.zeros(len(involved), bool).data
    copy_of = np.full(len(involved), -1)
    cosine_of = np.full(len(involved), np.nan, np.float32)
    is_fixed = involved < n_fixed
    for sample, (group_of, fixed) in enumerate(zip(group.data, is_fixed.data)):
        other = -1
        if not fixed:
            other = first[group_of]
            if other < 0:
                other = next(
                    (first[near_one] for near_one in near[group_of] if first[near_one] >= 0), -1
                )
            if other < 0:
                place = next((i for i in similar.places(sample) if stays[similar.others[i]]), -1)
                if place >= 0:
                    other, cosine_of[sample] = similar.others[place], cosines[place]

        copy_of[sample] = other
        if fixed or (other < 0 and not keep_copies):
            stays[sample] = True
            if first[group_of] < 0:
                first[group_of] = sample

    places = np.flatnonzero(copy_of >= 0)
    dropped = np.empty(len(places), DROPPED)
    dropped["sample"] = involved[places]
    dropped["copy_of"] = involved[copy_of[places]]
    dropped["cosine"] = cosine_of[places]
    return dropped


class _Neighbours:
    """For each of n samples its neighbours, in an order of preference."""

    def __init__(self, n: int, of: np.ndarray, others: np.ndarray) -> None:
        """`of`: rising."""
        self.starts = np.searchsorted(of, np.arange(n + 1)).data
        self.others = np.ascontiguousarray(others).data

    def __getitem__(self, sample: int) -> memoryview:
        return self.others[self.starts[sample] : self.starts[sample + 1]]

    def places(self, sample: int) -> range:
        """Where in `others` the sample's neighbours stand."""
        return range(self.starts[sample], self.starts[sample + 1])


def _involved(copies: Copies) -> np.ndarray:
    """The numbers of all samples that have a pair, rising."""
    near, similar = copies.near, copies.similar
    numbers = [copies.members.ravel(), near["earlier"], near["later"]]
    return np.unique(np.concatenate([*numbers, similar["earlier"], similar["later"]]))


def _groups(members: np.ndarray, involved: np.ndarray) -> np.ndarray:
    """For each involved sample the place of the first one of its fingerprint."""
    group = np.arange(len(involved))
    firsts, others = np.searchsorted(involved, members).T
    group[others] = firsts
    # The first one of a run of shards may itself belong to that of another run.
    return group[group]


def _near(pairs: np.ndarray, involved: np.ndarray) -> _Neighbours:
    """Near groups by the place of their first sample, in the order of fingerprints."""
    earlier = np.searchsorted(involved, pairs["earlier"])
    later = np.searchsorted(involved, pairs["later"])
    of, others = np.concatenate([earlier, later]), np.concatenate([later, earlier])
    places = np.concatenate([pairs["later_place"], pairs["earlier_place"]])
    order = np.lexsort((places, of))
    return _Neighbours(len(involved), of[order], others[order])


def _similar(pairs: np.ndarray, involved: np.ndarray) -> tuple[_Neighbours, np.ndarray]:
    """The earlier samples similar to each, the most similar first; and the cosines of all."""
    of = np.searchsorted(involved, pairs["later"])
    order = np.lexsort((pairs["earlier"], -pairs["cosine"], of))
    others = np.searchsorted(involved, pairs["earlier"])
    return _Neighbours(len(involved), of[order], others[order]), pairs["cosine"][order]
