"""What one reduction needs besides tensors, and what gathered and ring form share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlp import dist
from vlp.pairwise.reduction import Block, Reduction
from vlp.pairwise.tiled import Kept


class Implementation(Protocol):
    """A way to compute one block: its statistics, and their gradients."""

    def reduce(
        self, reduction: Reduction, block: Block, kept: Kept, tile_size: int = 0
    ) -> list[Tensor]: ...

    def gradients(
        self,
        reduction: Reduction,
        block: Block,
        statistics: list[Tensor],
        upstream: list[Tensor],
        kept: Kept,
        needed: Sequence[bool],
        tile_size: int = 0,
    ) -> list[Tensor | None]: ...


@dataclass(frozen=True)
class Execution:
    """All that `reduce` needs to know besides tensors."""

    group: dist.Group
    ring: bool = False
    implementation: Implementation | None = None  # None: the dense reference
    memory_budget: int = 0  # bytes for tiles kept from forward
    tile_size: int = 0  # 0: the device's default


def restorer(block: Block) -> Any:
    """A function from saved tensors back to (block, statistics): autograd must own the tensors, not
    the block.
    """
    n, spec = len(block.tensors), block.with_tensors((None,) * len(block.tensors))
    return lambda saved: (spec.with_tensors(saved[:n]), list(saved[n:]))


def full_precision(block: Block) -> torch.autocast:
    """Autocast would turn the float32 products of a tile into bfloat16."""
    return torch.autocast(block.left[0].device.type, enabled=False)
