"""What terms over more than two modalities read: a sample's rows, and which samples have them.

A sample that lacks a modality has no volume and no product with the others: it is neither a row
nor a candidate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Reduction, Tile, number, softplus, widened

OPTIONAL = frozenset({"others", "others_valid"})
BY_NAME = OPTIONAL | {"other_names"}


def further(inputs: Inputs) -> list[Tensor]:
    """The rows of the modalities beside image and text, [b, D] each."""
    return [] if inputs.others is None else list(inputs.others)


def complete(inputs: Inputs) -> Tensor:
    """Which samples have all modalities, [b] bool."""
    if inputs.others is None or inputs.others_valid is None:
        return torch.ones(len(inputs.image), dtype=torch.bool, device=inputs.image.device)
    return inputs.others_valid.all(0)


def mean_of_complete(losses: Tensor, valid: Tensor, pairs: Pairs) -> Tensor:
    """This rank's share of the mean over the samples that have all modalities, 0 where none has;
    their share of the samples is logged.
    """
    pairs.note("complete", pairs.mean(valid.float()))
    return pairs.mean(losses, valid)


def by_name(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """The rows [b, D] of every modality, and which samples have it, [b] bool or None: all. Further
    modalities without names go by their numbers.
    """
    rows = {"image": inputs.image, "text": inputs.text}
    masks: dict[str, Tensor | None] = {"image": None, "text": None}

    others = further(inputs)
    names = inputs.other_names or tuple(map(str, range(len(others))))
    for place, (name, of_modality) in enumerate(zip(names, others, strict=True)):
        rows[name] = of_modality
        masks[name] = None if inputs.others_valid is None else inputs.others_valid[place]
    return rows, masks


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Which samples have both modalities; None: all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def infonce(
    left: Tensor,  # [b, D]
    right: Tensor,  # [b, D]
    mask: Tensor | None,  # [b] bool: the samples that have both
    scale: Tensor | float,
    pairs: Pairs,
) -> Tensor:
    """This rank's share of InfoNCE among the samples that have both sides."""
    if mask is None:
        rows, columns, positive = pairs.logsumexp(left, right, scale)
        by_row, by_column = softplus(rows - positive), softplus(columns - positive)
        # As the term `infonce` adds them up, to the bit.
        return pairs.mean(0.5 * by_row + 0.5 * by_column)

    kept = mask.to(widened(left).dtype)
    rows, positive, columns = pairs.reduce(
        _AMONG_KEPT,
        [left],
        [right],
        row_values=[kept],
        column_values=[kept],
        shared=[number(scale, left)],
    )
    return pairs.mean((softplus(rows - positive) + softplus(columns - positive)) / 2, mask)


def _among_kept(tile: Tile) -> tuple[Tensor, ...]:
    """LSE_{j≠i} z_ij over columns that take part, the positive, and the same over rows."""
    z, positive = tile.shared[0] * tile.scores[0], tile.positive
    out_of_row = positive | (tile.column_values[0] == 0)
    out_of_column = positive | (tile.row_values[0] == 0).unsqueeze(1)
    return (
        z.masked_fill(out_of_row, -torch.inf),
        z.masked_fill(~positive, 0),
        z.masked_fill(out_of_column, -torch.inf),
    )


_AMONG_KEPT = Reduction(_among_kept, rows=(LOGSUMEXP, SUM), columns=(LOGSUMEXP,))
