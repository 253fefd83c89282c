"""Which pictures are copies of which: perceptual hashes, their neighbours, cosines in blocks, and
who stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

# seen: the picture opens
FINGERPRINT = np.dtype([("hash", "<u8"), ("grid", "u1", 48), ("seen", "?")])
# levels of 255, mean over the grid: recompressing moves it by 1 or 2, another color of a shape by
# more
COLORS = 12
ROUNDING = 1e-6  # of a cosine: equal rows are copies at --cosine 1, too
BLOCK = 4096  # rows on either side of a block of cosines: 64 MiB of scores
_SIDE = 32


def fingerprint(image: Image) -> tuple[int, np.ndarray]:
    """(pHash of 64 bits, mean colors on a 4 × 4 grid, uint8 [48]) of an RGB picture.

    A bit says whether one of the 8 × 8 lowest frequencies of the 32 × 32 gray picture lies above
    their median.
    """
    gray = np.asarray(image.convert("L").resize((_SIDE, _SIDE)), np.float64)
    frequencies = _cosines() @ gray @ _cosines().T

    # Rounded, so that flat pictures have no bits of noise; without the mean, which says nothing of
    # the shape.
    low = np.rint(frequencies / 8).ravel()
    bits = np.packbits(low > np.median(low[1:]))
    grid = np.asarray(image.resize((4, 4))).ravel()
    return int.from_bytes(bits.tobytes(), "big"), grid


@cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the orthonormal DCT of length 32."""
    k, x = np.arange(8)[:, None], np.arange(_SIDE)[None]
    # Orthonormal: row 0 is constant, which gives it another norm.
    norms = np.sqrt(np.where(k > 0, 2, 1) / _SIDE)
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE)) * norms


def neighbours(prints: np.ndarray, distance: int) -> dict[int, list[int]]:
    """Of fingerprints that all differ: for each, those within `distance` bits and COLORS levels,
    both ways.

    Two hashes within d bits agree in one of d + 1 parts, so only pairs that share a part are
    compared.
    """
    near: dict[int, set[int]] = {}
    for i, j in _sharing_a_part(prints["hash"], distance):
        # Cheapest first: the bits of all pairs, the colors of the few that are left.
        close = few_bits(prints["hash"][i] ^ prints["hash"][j], distance)
        i, j = i[close], j[close]
        apart = np.abs(prints["grid"][i].astype(np.int16) - prints["grid"][j]).mean(1)
        alike = apart <= COLORS
        for a, b in zip(i[alike].tolist(), j[alike].tolist()):
            near.setdefault(a, set()).add(b)
            near.setdefault(b, set()).add(a)
    return {a: sorted(others) for a, others in near.items()}


def _sharing_a_part(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, j) of places whose hashes agree in a part, as arrays; some come more than once."""
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    for low, high in pairwise(edges):
        part = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)

        # Sorted, equal parts lie side by side: neighbours one step apart, then two, until none are.
        order = np.argsort(part, kind="stable")
        part = part[order]
        at = np.arange(len(part))
        step = 1
        while True:
            at = at[at < len(part) - step]
            at = at[part[at] == part[at + step]]
            if not len(at):
                break
            yield order[at], order[at + step]
            step += 1


def few_bits(values: np.ndarray, n: int) -> np.ndarray:
    """Where at most `n` bits of 64-bit values are set: clearing the lowest set bit n times leaves
    nothing.
    """
    for _ in range(n):
        values = values & (values - np.uint64(1))
    return values == 0


@dataclass(frozen=True)
class Limits:
    """What makes a copy."""

    distance: int  # bits; −1: hashes are not compared
    cosine: float  # used where there are embeddings
    keep_copies: bool  # copies of fixed samples only


def decide(
    prints: np.ndarray, embeddings: list[np.ndarray], n_fixed: int, limits: Limits
) -> tuple[np.ndarray, np.ndarray]:
    """(for each sample the earlier one that it is a copy of, −1 where it stays; their cosine, nan
    where the hash told).

    `prints` [n] FINGERPRINT; `embeddings`: unit rows of the same samples in pieces [·, D] float16,
    or none at all. The first `n_fixed` samples stay whatever they are. The others go one by one:
    each that is a copy of a sample that stays before it is dropped, so every dropped one has a copy
    that stays.
    """
    copy_of = np.full(len(prints), -1)
    cosines = np.full(len(prints), np.nan, np.float32)
    groups = _Groups(prints, limits.distance)
    earlier: list[tuple[int, np.ndarray]] = []

    for start, stop, rows in _blocks(embeddings, len(prints)):
        may_stay = start < n_fixed or not limits.keep_copies
        similar: dict[int, list[tuple[int, float]]] = {}
        if rows is not None:
            similar = _similar(rows, earlier, start, copy_of, limits.cosine, inside=may_stay)

        # One by one: what a sample is compared with depends on what was decided before it.
        for sample in range(start, stop):
            if sample >= n_fixed:
                copy_of[sample], cosines[sample] = _earlier_copy(sample, groups, similar, copy_of)
            is_fixed = sample < n_fixed
            if is_fixed or (copy_of[sample] < 0 and not limits.keep_copies):
                groups.stays(sample)

        if rows is not None and may_stay:
            earlier.append((start, rows))
    return copy_of, cosines


def _earlier_copy(
    sample: int,
    groups: _Groups,
    similar: dict[int, list[tuple[int, float]]],
    copy_of: np.ndarray,
) -> tuple[int, float]:
    """(the sample that stays and that this one is a copy of, else −1; their cosine or nan)."""

    # The hash goes first: it needs no model, and copies.jsonl says which of the two told.
    by_hash = groups.first_near(sample)
    if by_hash >= 0:
        return by_hash, np.nan
    for other, cosine in similar.get(sample, ()):
        if copy_of[other] < 0:
            return other, cosine
    return -1, np.nan


class _Groups:
    """Samples of one fingerprint, the fingerprints near it, and the first sample of each that
    stays.
    """

    def __init__(self, prints: np.ndarray, distance: int) -> None:
        self.of = np.full(len(prints), -1)  # the group of each sample
        seen = np.flatnonzero(prints["seen"] & (distance >= 0))

        # As texts of bytes, which numpy sorts fast. They end in `seen`, never in zeros, which such
        # a text would lose.
        whole = np.ascontiguousarray(prints[seen]).view(f"S{FINGERPRINT.itemsize}")
        _, first, self.of[seen] = np.unique(whole, return_index=True, return_inverse=True)
        self.near = neighbours(prints[seen][first], distance) if len(seen) else {}
        self.first = [-1] * len(first)

    def first_near(self, sample: int) -> int:
        """The first sample that stays of its own fingerprint, else of one near it, else −1."""
        group = self.of[sample]
        if group < 0:
            return -1
        for near in (group, *self.near.get(group, ())):
            if self.first[near] >= 0:
                return self.first[near]
        return -1

    def stays(self, sample: int) -> None:
        """Later samples may be copies of this one."""
        group = self.of[sample]
        if group >= 0 and self.first[group] < 0:
            self.first[group] = sample


def _blocks(pieces: list[np.ndarray], n: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """(first, end, rows) of at most BLOCK samples of one piece; without embeddings all samples at
    once.
    """
    if not pieces:
        yield 0, n, None

    # In blocks, because all pairs of a large set fit into no memory.
    start = 0
    for piece in pieces:
        for i in range(0, len(piece), BLOCK):
            rows = piece[i : i + BLOCK]
            yield start, start + len(rows), rows
            start += len(rows)


def unit(rows: np.ndarray, device: str) -> Tensor:
    """Rows [n, D] at length 1, float32, so that products are cosines also of rows that came
    otherwise; zeros, which are similar to nothing, for those with NaN or infinity.
    """
    import torch

    unit_rows = torch.nn.functional.normalize(torch.from_numpy(np.array(rows)).to(device).float())
    # One NaN would hide all others from a maximum.
    return torch.where(unit_rows.isfinite().all(1, keepdim=True), unit_rows, 0)


def _similar(
    rows: np.ndarray,
    earlier: list[tuple[int, np.ndarray]],
    start: int,
    copy_of: np.ndarray,
    cosine: float,
    *,
    inside: bool,
) -> dict[int, list[tuple[int, float]]]:
    """For samples of a block: the most similar one that stays in the blocks before, then similar
    ones before it inside.
    """
    import torch

    from vlp.joining import local_device

    device = local_device("auto", shared=True)
    cosine = cosine - ROUNDING
    x = unit(rows, device)
    best = torch.full((len(x),), cosine, device=device)
    which = torch.full((len(x),), -1, device=device)
    for first, others in earlier:
        kept = np.flatnonzero(copy_of[first : first + len(others)] < 0)
        if not len(kept):
            continue
        y = unit(others[kept], device)
        score, place = (x @ y.T).max(1)

        # At the limit itself a first one counts; among equals the earliest stays.
        better = (score > best) | ((score == best) & (which < 0))
        which = torch.where(better, torch.from_numpy(kept + first).to(device)[place], which)
        best = torch.where(better, score, best)

    similar: dict[int, list[tuple[int, float]]] = {}
    for j, (i, score_of) in enumerate(zip(which.tolist(), best.tolist())):
        if i >= 0:
            similar[start + j] = [(i, score_of)]

    # Inside the block nobody knows yet who stays: all similar ones before a sample are kept.
    if inside:
        scores = (x @ x.T).tril(-1)
        for j, i in (scores >= cosine).nonzero().tolist():
            similar.setdefault(start + j, []).append((start + i, float(scores[j, i])))
    return similar
