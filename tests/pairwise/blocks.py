"""Shared by the tests of the kernels: blocks of many shapes, their float64 truth, and the errors of
an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.pairwise import dense
from vlp.pairwise.pairs import _multiples
from vlp.pairwise.reduction import MARGIN, ROW_MARGIN, SOFTPLUS, Block, Reduction
from vlp.pairwise.tiled import Kept

REDUCTIONS: dict[str, Reduction] = {
    "margin": MARGIN,
    "rows": ROW_MARGIN,
    "softplus": SOFTPLUS,
    "multiples": _multiples((1.25, 0.25)),
    "multiples with 0": _multiples((1.0, 0.0)),
}
BIAS = -3.0


@dataclass(frozen=True)
class Shape:
    """One block: b rows, n columns, and how its embeddings lie."""

    reduction: str
    b: int
    n: int
    D: int
    scale: float
    offset: int | None = 0
    rows: str = "random"  # aligned: pairs are alike; opposite: all rows face away from all columns
    mask: str = ""  # third: every third column is left out; all; values: finite column values
    dtype: str = "float32"
    tile_size: int = 16


def block_of(shape: Shape, device: str = "cpu") -> Block:
    """The block in the shape's dtype."""
    generator = torch.Generator().manual_seed(shape.b + shape.n)
    x, t = (
        torch.randn(size, shape.D, generator=generator, dtype=torch.float64)
        for size in (shape.b, shape.n)
    )
    if shape.rows == "aligned":
        x = t[: shape.b] + 0.3 * x[: shape.n]
    if shape.rows == "opposite":
        x[:, 0], t[:, 0] = 100.0, -100.0

    dtype = getattr(torch, shape.dtype)
    left, right = (F.normalize(rows, dim=1).to(device, dtype) for rows in (x, t))
    numbers = [shape.scale, BIAS] if shape.reduction == "softplus" else [shape.scale]
    shared = tuple(torch.tensor(number, device=device) for number in numbers)
    return Block((left,), (right,), (), _column_values(shape, device), shared, shape.offset)


def _column_values(shape: Shape, device: str) -> tuple[Tensor, ...]:
    if not shape.mask:
        return ()
    values = torch.zeros(shape.n, device=device)
    if shape.mask == "values":
        return (values + torch.arange(shape.n, device=device) / shape.n,)
    every = 3 if shape.mask == "third" else 1
    values[::every] = -torch.inf
    return (values,)


def upstream_of(statistics: Any) -> list[Tensor]:
    """Weights of both signs for each statistic, as large as those of a mean; 0 for −∞."""
    generator = torch.Generator().manual_seed(1)
    weights = []
    for statistic in statistics:
        weight = torch.randn(len(statistic), generator=generator, dtype=torch.float64)
        weight = weight.to(statistic.device) / len(statistic)
        weights.append(weight.masked_fill(statistic.detach().isinf(), 0))
    return weights


def truth(shape: Shape, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """Statistics, and gradients of left, right and shared, of the dense reference in float64."""
    block = block_of(shape, device)
    leaves = [tensor.double().requires_grad_() for tensor in block.tensors]
    statistics = dense.reduce(REDUCTIONS[shape.reduction], block.with_tensors(leaves))

    # 0·−∞ would be NaN.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for statistic, weight in zip(statistics, upstream_of(statistics)):
        total = total + (weight * statistic)[statistic.isfinite()].sum()
    wanted = [leaf for leaf, flag in zip(leaves, _needed(block)) if flag]
    gradients = torch.autograd.grad(total, wanted, materialize_grads=True)
    return [statistic.detach() for statistic in statistics], list(gradients)


def computed(
    implementation: Any, shape: Shape, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """The same by an implementation, in the shape's dtype."""
    block, reduction = block_of(shape, device), REDUCTIONS[shape.reduction]
    assert implementation.supports(reduction, block)
    statistics = implementation.reduce(reduction, block, Kept(0), shape.tile_size)
    needed = _needed(block)
    gradients = implementation.gradients(
        reduction,
        block,
        statistics,
        upstream_of(statistics),
        Kept(0),
        needed,
        shape.tile_size,
    )
    return statistics, [gradient for gradient, flag in zip(gradients, needed) if flag]


def _needed(block: Block) -> list[bool]:
    """Gradients of embeddings and of shared numbers, not of column values."""
    flags = block.with_tensors([True] * len(block.tensors))
    return [*flags.left, *flags.right, *[False] * len(block.column_values), *flags.shared]


def excess(shape: Shape, results: Any, expected: Any) -> float:
    """The largest error, as a multiple of what is allowed.

    Statistics: 1e-6·(1 + scale + |value|) in float32, where a score is rounded by scale·6e-8.
    Gradients: 1e-5 of their norm, more above scale 100. Half precision: 1e-2 of both, and 1e-3.
    """
    half = shape.dtype != "float32"
    worst = 0.0
    for result, value in zip(results[0], expected[0]):
        infinite = value.isinf()
        if not torch.equal(result[infinite], value[infinite]):
            return float("inf")
        allowed = (1e-2 if half else 1e-6) * (1 + abs(shape.scale) + value.abs())
        ratio = ((result - value).abs() / allowed)[~infinite]
        worst = max(worst, ratio.max().item() if len(ratio) else 0.0)

    # A scale's gradient is a small difference of large sums of rounded numbers.
    relative, absolute = (1e-2, 1e-3) if half else (1e-5 * max(1.0, abs(shape.scale) / 100), 1e-9)
    for result, value in zip(results[1], expected[1]):
        error, norm = (result.double() - value).norm().item(), value.norm().item()
        worst = max(worst, error / (relative * norm + absolute))
    return worst
