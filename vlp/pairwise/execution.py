"""How one reduction is carried out: which ranks take part, and which implementation computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """All that `exchange.reduce` needs to know besides tensors."""

    group: dist.Group
    ring: bool = False
    implementation: Implementation | None = None  # None: the dense reference
    memory_budget: int = 0  # bytes for tiles kept from forward
    tile_size: int = 0  # 0: the device's default


Restore = Callable[[Sequence[Tensor]], tuple[Block, list[Tensor]]]


def restorer(block: Block) -> Restore:
    """A function from an autograd context's saved tensors back to (block, statistics).

    Autograd must own the tensors, so that a backward frees them and hooks on saved tensors see
    them; what is kept of the block here is its form alone.
    """
    # A block without tensors: a closure over the block would keep them alive.
    n_tensors = len(block.tensors)
    form = block.with_tensors((None,) * n_tensors)

    def restore(saved: Sequence[Tensor]) -> tuple[Block, list[Tensor]]:
        return form.with_tensors(saved[:n_tensors]), list(saved[n_tensors:])

    return restore


def full_precision(block: Block) -> torch.autocast:
    """A context without autocast, which would turn a tile's float32 products into bfloat16."""
    return torch.autocast(block.left[0].device.type, enabled=False)
