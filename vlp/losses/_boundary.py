"""The boundary between an objective's arithmetic and its caller's autograd.

Inside, a graph of its own: autocast reaches neither its forward nor its backward pass, wherever
these are called, and nobody differentiates a gradient that knows only its first derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.losses._inputs import Inputs


def evaluated(evaluate: Callable[[Inputs], tuple[Any, ...]], inputs: Inputs) -> tuple[Any, ...]:
    """`evaluate(inputs)` inside the boundary.

    Returns the first result, the total, as one node of the caller's graph, and the others as they
    are.
    """
    outer = {name: value for name, value in inputs.tensors().items() if value.requires_grad}

    # Leaves of a graph of its own: the caller's autograd sees one node, the total.
    with _no_autocast(inputs.image):
        if not outer or not torch.is_grad_enabled():
            return evaluate(inputs)
        inner: dict[str, Any] = {
            name: value.detach().requires_grad_() for name, value in outer.items()
        }

        total, *others = evaluate(replace(inputs, **inner))

    if not total.requires_grad:
        return total, *others
    return _Total.apply((total, *inner.values()), *outer.values()), *others


class _Total(torch.autograd.Function):
    """(the inner total, its leaves), the caller's tensors in the leaves' order -> the total."""

    @staticmethod
    def forward(ctx: Any, inner: tuple[Tensor, ...], *outer: Tensor) -> Tensor:
        # As saved tensors they live as long as the caller's graph: a backward frees them, unless it
        # retains the graph.
        ctx.save_for_backward(*inner)
        return inner[0].detach().clone()

    @staticmethod
    @dist.first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, *leaves = ctx.saved_tensors

        # Retained: the caller may call backward again on a graph that it retains.
        with _no_autocast(total):
            gradients = torch.autograd.grad(
                total, leaves, gradient, retain_graph=True, allow_unused=True
            )
        return None, *gradients


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
