"""Symile: the modalities of a sample have a large product, entry by entry, all of them at once.

    L = mean_a mean_i CE of the sample's own tuple among the candidates of row r_a,i,
    z = scale·Σ_d r_a,i(d)·Π_{m≠a} r_m,j_m(d)

r_m: [b, D], the k modalities: text, image, and further ones [O, b, D] (`others`); each is the
anchor a once. The candidates are tuples (j_m), one sample's row of each other modality:

    n           n of them, by a permutation π_m of the group's samples of each modality, drawn from
                (seed, step), and the sample's own tuple beside them
    n_squared   all n^(k−1), for n <= 256 and n^k <= 2²⁴

The own tuple, where a permutation happens to give it, is no negative. Samples that lack a modality
(`others_valid`) are neither rows nor candidates; a batch without any complete sample gives 0, and
`complete` in the log is the share that has all.

Relations:
- of image and text alone both are `infonce`

Papers:
- Symile (arXiv 2411.01053): `objective: {symile: {}}`; with all tuples `objective: {symile:
  {negatives: n_squared}}`; its release keeps the own tuple among the negatives

Needs: image, text, scale; where the call carries them others and others_valid

Cost: a pass over n candidates for each modality, and their rows gathered; O(k·n·D) memory.
n_squared: passes over n^(k−1) candidates, O(b·n^(k−2)·D) memory

Use: where modalities say something only together, as a text that chooses what of the image the
sound belongs to; rows of two need not be alike for that, and queries of one modality want
`infonce` beside it. A product of k unit rows is of the order D^(1 − k/2): start the scale as high
as it takes, and raise its bound
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses import _modalities
from vlp.losses._draws import draws
from vlp.losses._inputs import Inputs
from vlp.losses._modalities import OPTIONAL as OPTIONAL  # what the house asks of a term
from vlp.pairwise import LOGSUMEXP, Pairs, Reduction, Tile, number, softplus, widened
from vlp.seeds import derive

NEEDS = frozenset({"image", "text", "scale"})
MOST_SAMPLES = 256  # of n_squared
MOST_SCORES = 2**24  # 256³: of one anchor
MIXED = -1.0  # a tuple of several samples


@dataclass(frozen=True)
class Options:
    # n: as many tuples as candidates, by permutations; n_squared: all, of few candidates
    negatives: Literal["n", "n_squared"] = "n"


@dataclass(frozen=True)
class Tuples:
    """The candidates of one anchor that this rank holds, [c]."""

    rows: Tensor  # [c, D], the product of their rows
    sample: Tensor  # [c], the place in the group whose own tuple it is; MIXED: nobody's
    kept: Tensor  # [c] bool: of complete samples alone


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    valid = _modalities.complete(inputs)
    inputs = inputs.operands()
    modalities = [inputs.text, inputs.image, *_modalities.further(inputs)]
    product = _product([widened(rows) for rows in modalities])
    positive = number(inputs.scale, inputs.text) * product.sum(1)  # [b]

    if options.negatives == "n":
        tuples = _permuted(modalities, valid, pairs, inputs.step or 0)
    else:
        tuples = _all(modalities, valid, pairs)
    negatives = [
        _logsumexp(anchor, candidates, inputs.scale, pairs)
        for anchor, candidates in zip(modalities, tuples, strict=True)
    ]
    losses = softplus(torch.stack(negatives) - positive).mean(0)
    return _modalities.mean_of_complete(losses, valid, pairs)


def _logsumexp(anchor: Tensor, tuples: Tuples, scale: Tensor | float, pairs: Pairs) -> Tensor:
    """log Σ e^z over the candidates of the group but the own tuple, [b]; −∞ where none is left."""
    dtype = widened(anchor).dtype
    (row_statistic,) = pairs.reduce(
        Reduction(_negatives, rows=(LOGSUMEXP,)),
        [anchor],
        [tuples.rows],
        row_values=[_places(len(anchor), pairs, anchor.device).to(dtype)],
        column_values=[tuples.sample.to(dtype), tuples.kept.to(dtype)],
        shared=[number(scale, anchor)],
        paired=False,
    )
    return row_statistic


def _negatives(tile: Tile) -> tuple[Tensor, ...]:
    (place,), (sample, kept) = tile.row_values, tile.column_values
    left_out = (place.unsqueeze(1) == sample) | (kept == 0)
    return ((tile.shared[0] * tile.scores[0]).masked_fill(left_out, -torch.inf),)


def _product(rows: list[Tensor]) -> Tensor:
    # torch.prod's gradient divides by its entries, and asks a device whether one is 0.
    return functools.reduce(torch.mul, rows)


def _places(n_rows: int, pairs: Pairs, device: torch.device) -> Tensor:
    """The places of this rank's rows in the group, [b]."""
    return pairs.group.index * n_rows + torch.arange(n_rows, device=device)


def _permuted(modalities: list[Tensor], valid: Tensor, pairs: Pairs, step: int) -> list[Tuples]:
    """Tuples by a permutation of each modality, for each anchor."""
    n_rows, device = len(valid), valid.device
    own = slice(pairs.group.index * n_rows, (pairs.group.index + 1) * n_rows)
    complete = pairs.gather(valid.to(torch.uint8)).bool()  # [n]

    places, rows = [], []
    for m, of_modality in enumerate(modalities):
        permutation = _permutation(complete, m, step, n_rows, pairs, device)[own]
        places.append(permutation)
        # Widened before rows are picked, as a product in half precision would be rounded twice.
        rows.append(widened(pairs.gather(of_modality))[permutation])

    tuples = []
    for anchor, of_anchor in enumerate(modalities):
        others = [m for m in range(len(modalities)) if m != anchor]
        product = _product([rows[m] for m in others])
        of_tuple = torch.stack([places[m] for m in others])
        sample = torch.where((of_tuple == of_tuple[0]).all(0), of_tuple[0], MIXED)
        tuples.append(Tuples(product.to(of_anchor.dtype), sample, complete[own]))
    return tuples


def _permutation(
    complete: Tensor, modality: int, step: int, n_rows: int, pairs: Pairs, device: torch.device
) -> Tensor:
    """Whose row stands at each place of the group, [n]: complete samples change places among
    themselves.
    """
    # By the row of the step, so that any number of ranks draws the same.
    first_row = pairs.backend.ranks.index * n_rows
    numbers = pairs.gather(first_row + torch.arange(n_rows, device=device))
    seed = derive(pairs.backend.seed, "symile", modality, step)
    keys = next(draws(numbers, seed, 1))[:, 0]

    incomplete = (~complete).to(keys.dtype)
    permutation = torch.empty_like(numbers)
    permutation[incomplete.argsort(stable=True)] = (keys + incomplete).argsort(stable=True)
    return permutation


def _all(modalities: list[Tensor], valid: Tensor, pairs: Pairs) -> list[Tuples]:
    """All tuples for each anchor: this rank's rows of the first other modality with the group's of
    the rest.
    """
    n_rows = len(valid)
    n = pairs.candidates(n_rows)
    _check_size(n, len(modalities))
    places, complete = _places(n_rows, pairs, valid.device), pairs.gather(valid.to(torch.uint8))

    tuples = []
    gathered = [widened(pairs.gather(rows)) for rows in modalities]
    for anchor, of_anchor in enumerate(modalities):
        first, *rest = [m for m in range(len(modalities)) if m != anchor]
        product, sample, kept = widened(modalities[first]), places, valid
        for m in rest:
            product = (product.unsqueeze(1) * gathered[m]).flatten(0, 1)
            same = sample.unsqueeze(1) == torch.arange(n, device=valid.device)
            sample = torch.where(same, sample.unsqueeze(1), MIXED).flatten()
            kept = (kept.unsqueeze(1) & complete.bool()).flatten()
        tuples.append(Tuples(product.to(of_anchor.dtype), sample, kept))
    return tuples


def check_modalities(options: Options, names: list[str], width: int, n: int) -> None:
    """Refuse more tuples than n_squared compares. ValueError."""
    if options.negatives == "n_squared":
        _check_size(n, len(names))


def _check_size(n: int, n_modalities: int) -> None:
    if n > MOST_SAMPLES or n**n_modalities > MOST_SCORES:
        raise ValueError(
            f"negatives: n_squared compares {n:,} candidates a row of {n_modalities} modalities, "
            f"{n**n_modalities:,} products for each anchor; expected at most {MOST_SAMPLES} and "
            f"{MOST_SCORES:,}: write negatives: n, or make batch or group smaller"
        )
