"""What terms over patches and tokens share: which patches take part, and functions in chunks of
rows that backward computes again, so that what they hold is of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.losses._inputs import Inputs

NUMBERS = 1 << 22  # of the largest tensor that a function holds at once: 16 MiB in float32


def patch_mask(inputs: Inputs) -> Tensor:
    """Which patches take part, [b, P] bool: all where the call does not say."""
    if inputs.image_tokens_valid is not None:
        return inputs.image_tokens_valid
    return torch.ones_like(inputs.image_tokens[..., 0], dtype=torch.bool)


def in_chunks(
    function: Callable[..., Tensor],  # of rows of each tensor, to a tensor of the same rows
    rows: Sequence[Tensor],  # [b, …] each
    *others: Tensor,
    numbers: int,  # that the function holds of one row
) -> Tensor:
    """`function(*rows, *others)`, chunk by chunk where that is needed."""
    size = max(1, NUMBERS // numbers)
    if len(rows[0]) <= size:
        return function(*rows, *others)

    # Split once: the gradients of the chunks then meet in one tensor, not in one a chunk.
    split = [tensor.split(size) for tensor in rows]
    chunks = [recomputed(function, *chunk, *others) for chunk in zip(*split)]
    return torch.cat(chunks)


def recomputed(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """`function(*arguments)`, of which nothing but the arguments is kept for backward."""
    result: Tensor = _Recomputed.apply(function, *arguments)
    return result


class _Recomputed(torch.autograd.Function):
    """As torch's checkpoint, which held 580 MiB for `filip` of 1,024 samples of 8 patches and 8
    tokens; this holds 356.
    """

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*arguments)
        return function(*arguments)

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        leaves = [argument.detach() for argument in ctx.saved_tensors]
        differentiated = [leaf for leaf, wanted in zip(leaves, needed) if wanted]
        for leaf in differentiated:
            leaf.requires_grad_()

        with torch.enable_grad():
            result = ctx.function(*leaves)
        gradients = iter(torch.autograd.grad(result, differentiated, gradient, allow_unused=True))
        return None, *(next(gradients) if wanted else None for wanted in needed)
