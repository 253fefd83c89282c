"""Batch norms whose running statistics move in one of the two passes over a micro-batch, and by
what the tower pools alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a model, timm's own included."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def moved_once(norms: list[_BatchNorm]) -> Iterator[None]:
    """Around a forward: statistics move if it keeps a graph, and only then.

    Of two passes over a micro-batch one keeps a graph. A norm in evaluation mode reads its
    statistics in any case. Activation checkpointing computes a block once more, in backward, and
    there they move again: without them torch would not know the recomputed tensors.
    """
    with _moving(norms, torch.is_grad_enabled()):
        yield


@contextmanager
def kept_still(norms: list[_BatchNorm]) -> Iterator[None]:
    """Around a forward whose rows are not those that the statistics are of: they do not move."""
    with _moving(norms, False):
        yield


@contextmanager
def _moving(norms: list[_BatchNorm], moves: bool) -> Iterator[None]:
    for norm in norms:
        norm.track_running_stats = moves
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
