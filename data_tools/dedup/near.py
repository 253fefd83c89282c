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

FINGERPRINT = np.dtype(
    [("hash", "<u8"), ("grid", "u1", 48), ("seen", "?")]
)  # seen: the picture opens
# levels of 255, mean over the grid: recompressing moves it by 1 or 2, another color of a shape by
# more
COLORS = 12
BLOCK = 4096  # rows on either side of a block of cosines: 64 MiB of scores
_SIDE = 32


def fingerprint(image: Image) -> tuple[int, np.ndarray]:
    """(pHash of 64 bits, mean colors on a 4 × 4 grid, uint8 [48]) of an RGB picture.

    A bit says whether one of the 8 × 8 lowest frequencies of the 32 × 32 gray picture lies above
    their median.
    """
    gray = np.asarray(image.convert("L").resize((_SIDE, _SIDE)), np.float64)
    low = np.rint(
        _cosines() @ gray @ _cosines().T / 8
    ).ravel()  # rounded: flat pictures have no bits of noise
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), np.asarray(
        image.resize((4, 4))
    ).ravel()


@cache
def _cosines() -> np.ndarray:
    """The first 8 rows of the orthonormal DCT of length 32."""
    k, x = np.arange(8)[:, None], np.arange(_SIDE)[None]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE)) * np.sqrt((1 + (k > 0)) / _SIDE)


def neighbours(prints: np.ndarray, distance: int) -> dict[int, list[int]]:
    """Of fingerprints that all differ: for each, those within `distance` bits and COLORS levels,
    both ways.

    Two hashes within d bits agree in one of d + 1 parts, so only pairs that share a part are
    compared.
    """
    found: dict[int, set[int]] = {}
    for i, j in _sharing_a_part(prints["hash"], distance):
        close = _few_bits(prints["hash"][i] ^ prints["hash"][j], distance)
        i, j = i[close], j[close]
        apart = np.abs(prints["grid"][i].astype(np.int16) - prints["grid"][j]).mean(1)
        for a, b in zip(i[apart <= COLORS].tolist(), j[apart <= COLORS].tolist()):
            found.setdefault(a, set()).add(b)
            found.setdefault(b, set()).add(a)
    return {a: sorted(others) for a, others in found.items()}


def _sharing_a_part(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    edges = np.linspace(0, 64, distance + 2).round().astype(int)
    for low, high in pairwise(edges):
        part = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(part, kind="stable")
        part, at, step = part[order], np.arange(len(part)), 1
        while len(at := at[at < len(part) - step]) and len(at := at[part[at] == part[at + step]]):
            yield order[at], order[at + step]
            step += 1


def _few_bits(values: np.ndarray, n: int) -> np.ndarray:
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
    copy_of, cosines = np.full(len(prints), -1), np.full(len(prints), np.nan, np.float32)
    groups = _Groups(prints, limits.distance)
    earlier: list[tuple[int, np.ndarray]] = []
    for start, stop, rows in _blocks(embeddings, len(prints)):
        may_stay = start < n_fixed or not limits.keep_copies
        similar = (
            {}
            if rows is None
            else _similar(rows, earlier, start, copy_of, limits.cosine, inside=may_stay)
        )
        for j in range(start, stop):
            if j >= n_fixed and (i := groups.find(j)) >= 0:
                copy_of[j] = i
            elif j >= n_fixed and (
                match := next(((i, c) for i, c in similar.get(j, ()) if copy_of[i] < 0), None)
            ):
                copy_of[j], cosines[j] = match
            elif j < n_fixed or not limits.keep_copies:
                groups.stays(j)
        if rows is not None and may_stay:
            earlier.append((start, rows))
    return copy_of, cosines


class _Groups:
    """Samples of one fingerprint, the fingerprints near it, and the first sample of each that
    stays.
    """

    def __init__(self, prints: np.ndarray, distance: int) -> None:
        self.of = np.full(len(prints), -1)  # the group of each sample
        seen = np.flatnonzero(prints["seen"] & (distance >= 0))
        whole = np.ascontiguousarray(prints[seen]).view(
            f"S{FINGERPRINT.itemsize}"
        )  # ends in `seen`, never in zeros
        _, first, self.of[seen] = np.unique(whole, return_index=True, return_inverse=True)
        self.near = neighbours(prints[seen][first], distance) if len(seen) else {}
        self.first = [-1] * len(first)

    def find(self, sample: int) -> int:
        """The first sample that stays of its own fingerprint, else of one near it, else −1."""
        group = self.of[sample]
        if group < 0:
            return -1
        return next(
            (self.first[g] for g in (group, *self.near.get(group, ())) if self.first[g] >= 0), -1
        )

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
    start = 0
    for piece in pieces:
        for i in range(0, len(piece), BLOCK):
            rows = piece[i : i + BLOCK]
            yield start, start + len(rows), rows
            start += len(rows)


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

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.from_numpy(np.array(rows)).to(device).float()
    best, which = (
        torch.full((len(x),), cosine, device=device),
        torch.full((len(x),), -1, device=device),
    )
    for first, others in earlier:
        kept = np.flatnonzero(copy_of[first : first + len(others)] < 0)
        if len(kept):
            score, place = (x @ torch.from_numpy(others[kept]).to(device).float().T).max(1)
            better = (score > best) | ((score == best) & (which < 0))
            which = torch.where(better, torch.from_numpy(kept + first).to(device)[place], which)
            best = torch.where(better, score, best)
    found = {
        start + j: [(i, c)] for j, (i, c) in enumerate(zip(which.tolist(), best.tolist())) if i >= 0
    }
    if inside:
        scores = (x @ x.T).tril(-1)
        for j, i in (scores >= cosine).nonzero().tolist():
            found.setdefault(start + j, []).append((start + i, float(scores[j, i])))
    return found
