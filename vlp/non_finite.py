"""NaN and infinity in a step: found on the device before the update, and named afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.fields import EMBEDDED
from vlp.types import Batch

_N_SHOWN = 20  # places that a message names


class NonFiniteError(RuntimeError):
    """Embeddings, loss or gradients with NaN or infinity; nothing was updated."""


class Statistics:
    """The running statistics of a model's batch norms, to be put back where a step does not count:
    they move in the forward pass, before that is known.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._before: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                self._before += [(buffer, buffer.clone()) for buffer in module.buffers()]

    def put_back(self) -> None:
        for buffer, before in self._before:
            buffer.copy_(before)


def nan_unless_finite(values: list[Tensor]) -> Tensor:
    """1.0 on every rank where all values of all ranks are finite, else NaN: [] float32. Collective,
    without a wait.

    As a factor of what is backpropagated it makes the norm of the gradient tell the whole story, so
    that one check by the engine guards the update.
    """
    finite = torch.stack([torch.isfinite(value).all() for value in values]).all()

    # Counted, not compared: the answer of every rank stays on the device.
    n_bad = dist.all_reduce((~finite).float(), dist.world())
    return torch.where(n_bad > 0, torch.nan, torch.ones_like(n_bad))


def where_not_finite(values: Mapping[str, Any], batch: Batch) -> list[str]:
    """Which tensors of which samples of all ranks are not finite, in words. Collective."""
    lines = []
    for name, value in values.items():
        # Numbers such as the scale belong to no sample, and ids are always finite.
        if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
            continue

        finite = torch.isfinite(value)
        bad_rows = ~finite.flatten(1).all(1) if value.ndim > 1 else ~finite
        for row in bad_rows.nonzero().flatten().tolist():
            lines.append(f"{_described(name)} {_place(row, value, batch)}")

    return list(chain.from_iterable(dist.gather_objects(lines)))


def message(lines: list[str], step: int) -> str:
    """The error text of a step in which `where_not_finite` found these places."""
    shown = "\n  ".join(lines[:_N_SHOWN])

    # Embeddings and labels are finite: what broke lies behind them.
    if not lines:
        shown = (
            "no embedding: an overflow in the loss (scale, bias, weights of the terms) "
            "or in the towers' backward pass"
        )

    if len(lines) > _N_SHOWN:
        shown += f"\n  … and {len(lines) - _N_SHOWN} more"
    return f"NaN or infinity at step {step}; nothing was updated:\n  {shown}"


def _place(row: int, value: Tensor, batch: Batch) -> str:
    """The sample of a row; views and queues have rows that are no sample's."""
    if len(value) == len(batch):
        return f"of sample {batch.sample_id[row].item()} ({batch.key[row]})"
    return f"row {row}"


def _described(name: str) -> str:
    # What no tower made, such as a label or a teacher's embedding, is named alone.
    if name not in EMBEDDED:
        return name
    return f"{name} embedding ({EMBEDDED[name].tower} tower)"
