"""The form `decoupled` of `captions`: all captions of all samples are candidates at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import LOGSUMEXP, Pairs, Reduction, Tile, softplus
from vlp.pairwise.reduction import accumulation_dtype, widened


def decoupled(inputs: Inputs, pairs: Pairs, weights: Tensor) -> Tensor:
    """This rank's share of the term; weights: w of each column, [K']."""
    valid = inputs.captions_valid
    takes_part = valid.any(1)
    to_text, to_image = _others(inputs, pairs)

    cosines = torch.einsum("bd,bkd->bk", widened(inputs.image), widened(inputs.captions))
    positive = torch.as_tensor(inputs.scale) * cosines  # [b, K']

    # Every caption of a sample competes with those of other samples alone.
    losses = softplus(to_text.unsqueeze(1) - positive) + softplus(to_image - positive)
    shares = valid.to(losses.dtype) * weights
    total_share = shares.sum(1)
    of_samples = (torch.where(valid, losses, 0) * shares).sum(1)
    of_samples = of_samples / torch.where(total_share > 0, total_share, 1)

    # A sample whose captions all weigh nothing has no mean.
    return pairs.mean(of_samples / 2, takes_part & (total_share > 0))


def _others(inputs: Inputs, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """LSE of each image over the valid captions of other samples [b], and of each caption over the
    images of other samples that have one [b, K'].
    """
    valid = inputs.captions_valid
    n_rows, n_columns = valid.shape
    dtype = accumulation_dtype(inputs.image)

    # Samples are numbered over the group: a caption knows its own by that number. float32 is exact
    # to 2^24 samples.
    first = pairs.group.index * n_rows
    number = torch.arange(first, first + n_rows, device=valid.device).to(dtype)
    image_mask = _mask(valid.any(1), dtype)
    caption_mask = _mask(valid, dtype).flatten()

    to_text, to_image = pairs.reduce(
        _OTHER_SAMPLES,
        [inputs.image],
        [inputs.captions.flatten(0, 1)],
        row_values=[number, image_mask],
        column_values=[number.repeat_interleave(n_columns), caption_mask],
        shared=[torch.as_tensor(inputs.scale, device=valid.device).to(dtype)],
        paired=False,
    )
    return to_text, to_image.view(n_rows, n_columns)


def _other_samples(tile: Tile) -> tuple[Tensor, Tensor]:
    """Scores of the pairs of two samples, −∞ where a side takes no part; for rows and columns."""
    row_number, row_mask = tile.row_values
    column_number, column_mask = tile.column_values
    z = tile.shared[0] * tile.scores[0] + row_mask.unsqueeze(1) + column_mask

    # One matrix serves both: what a masked side itself comes to is not read.
    same = row_number.unsqueeze(1) == column_number
    others = z.masked_fill(same, -torch.inf)
    return others, others


_OTHER_SAMPLES = Reduction(_other_samples, rows=(LOGSUMEXP,), columns=(LOGSUMEXP,))


def _mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `valid`, −∞ elsewhere."""
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(
        ~valid, -torch.inf
    )
