"""Functions of tokens in chunks of rows that backward computes again, so that what they hold is of
one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlp import dist

NUMBERS = 1 << 22  # of the largest tensor that a function holds at once: 16 MiB in float32


def in_chunks(
    function: Callable[..., Tensor],  # of rows of each tensor, to a tensor of the same rows
    rows: Sequence[Tensor | None],  # [b, …] each
    *others: Tensor,
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
    result: Tensor = _Recomputed.apply(function, *arguments)
    return result


class _Recomputed(torch.autograd.Function):
    """As torch's checkpoint, which held 580 MiB for `filip` of 1,024 samples of 8 patches and 8
    tokens; this holds 356.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.function = function
        ctx.is_tensor = [isinstance(argument, Tensor) for argument in arguments]
        ctx.save_for_backward(*(one for one in arguments if isinstance(one, Tensor)))
        return function(*arguments)

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        leaves: list[Tensor | None] = []
        tensors = iter(ctx.saved_tensors)
        for place, is_tensor in enumerate(ctx.is_tensor, start=1):
            leaf = next(tensors).detach() if is_tensor else None
            if leaf is not None and ctx.needs_input_grad[place]:
                leaf.requires_grad_()
            leaves.append(leaf)

        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with torch.enable_grad():
            result = ctx.function(*leaves)
        gradients = iter(torch.autograd.grad(result, wanted, gradient, allow_unused=True))
        return None, *(next(gradients) if needed else None for needed in ctx.needs_input_grad[1:])
