"""Who stays, decided from the pairs of near samples, in the order of the samples.

The rule is that of `vlp.data_tools.dedup.near.decide`: a sample is dropped if and only if it is a
copy of one that stays before it. Samples without a pair stay, and take no memory here: about 100
bytes for each of the others, and 100 for each pair.
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
    equal: np.ndarray  # [m, 2] the first sample of an embedding, a further one
    similar: np.ndarray  # SIMILAR


def decide(copies: Copies, n_fixed: int, keep_copies: bool) -> np.ndarray:
    """DROPPED samples, in order. The first `n_fixed` samples stay whatever they are, and only of
    them copies are dropped with `keep_copies`.
    """
    involved = _involved(copies)
    deciding = _Deciding(copies, involved)
    copy_of = np.full(len(involved), -1)
    cosines = np.full(len(involved), np.nan, np.float32)
    # One by one, because what a sample is compared with depends on what was decided before it.
    for sample, is_fixed in enumerate((involved < n_fixed).tolist()):
        if not is_fixed:
            copy_of[sample], cosines[sample] = deciding.earlier_copy(sample)
        if is_fixed or (copy_of[sample] < 0 and not keep_copies):
            deciding.stays(sample)

    places = np.flatnonzero(copy_of >= 0)
    dropped = np.empty(len(places), DROPPED)
    dropped["sample"] = involved[places]
    dropped["copy_of"] = involved[copy_of[places]]
    dropped["cosine"] = cosines[places]
    return dropped


class _Deciding:
    """What is known after some of the involved samples; these are numbered from 0 here."""

    def __init__(self, copies: Copies, involved: np.ndarray) -> None:
        # Memory that Python reads number by number, which it does slowly from arrays.
        self.group = _groups(copies.members, involved).data
        self.near = _near(copies.near, involved)
        row = _groups(copies.equal, involved)
        self.similar, self.cosines = _similar(copies.similar, involved, row)
        self.row = row.data
        # The first sample of each group, and of each embedding, that stays; -1: none so far.
        self.first = np.full(len(involved), -1).data
        self.first_of_row = np.full(len(involved), -1).data

    def earlier_copy(self, sample: int) -> tuple[int, float]:
        """(the sample that stays and that this one is a copy of, else -1; their cosine or nan)."""
        # The hash goes first, as where all are compared with all.
        group = self.group[sample]
        if self.first[group] >= 0:
            return self.first[group], np.nan
        for other_group in self.near[group]:
            if self.first[other_group] >= 0:
                return self.first[other_group], np.nan

        row = self.row[sample]
        if self.first_of_row[row] >= 0:
            return self.first_of_row[row], 1.0
        for place in self.similar.places(row):
            other = self.first_of_row[self.similar.others[place]]
            if other >= 0:
                return other, self.cosines[place]
        return -1, np.nan

    def stays(self, sample: int) -> None:
        """Later samples may be copies of this one."""
        if self.first[self.group[sample]] < 0:
            self.first[self.group[sample]] = sample
        if self.first_of_row[self.row[sample]] < 0:
            self.first_of_row[self.row[sample]] = sample


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
    numbers = [copies.members.ravel(), near["earlier"], near["later"], copies.equal.ravel()]
    return np.unique(np.concatenate([*numbers, similar["earlier"], similar["later"]]))


def _groups(members: np.ndarray, involved: np.ndarray) -> np.ndarray:
    """For each involved sample the place of the first one of its fingerprint, or embedding."""
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


def _similar(
    pairs: np.ndarray, involved: np.ndarray, row: np.ndarray
) -> tuple[_Neighbours, np.ndarray]:
    """The embeddings similar to each, by the place of their first sample, the most similar first;
    and the cosines of all.
    """
    earlier = row[np.searchsorted(involved, pairs["earlier"])]
    later = row[np.searchsorted(involved, pairs["later"])]
    of, others = np.concatenate([earlier, later]), np.concatenate([later, earlier])
    cosines = np.concatenate([pairs["cosine"], pairs["cosine"]])
    order = np.lexsort((others, -cosines, of))
    return _Neighbours(len(involved), of[order], others[order]), cosines[order]
