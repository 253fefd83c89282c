"""Functions of tokens in chunks of rows that backward computes again, so that what they hold is of
one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

NUMBERS = 1 << 22  # of the largest tensor that a function holds at once: 16 MiB in float32


def in_chunks(
    function: Callable[..., Tensor],  # of rows of each tensor, to a tensor of the same rows
    rows: Sequence[Tensor | None],  # [b, …] each
    *others: Any,
    numbers: int,  # that the function holds of one row
) -> Tensor:
    """`function(*rows, *others)`, chunk by chunk where that is needed."""
    n_rows = next(len(tensor) for tensor in rows if tensor is not None)
    size = max(1, NUMBERS // numbers)
    if n_rows <= size:
        return function(*rows, *others)

    n_chunks = -(-n_rows // size)
    # Split once: the gradients of the chunks then meet in one tensor, not in one a chunk.
    split = [[None] * n_chunks if one is None else one.split(size) for one in rows]
    chunks = [recomputed(function, *chunk, *others) for chunk in zip(*split)]
    return torch.cat(chunks)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which nothing but the arguments is kept for backward."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
