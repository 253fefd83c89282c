"""NaN and infinity in a step: found on the device before the update, and named afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.fields import EMBEDDED, FIELDS

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

    def put_back_unless(self, counts: Tensor) -> None:
        """Leave them where the step `counts`, [] bool on the device."""
        for buffer, before in self._before:
            buffer.copy_(torch.where(counts, buffer, before))


def all_finite(values: list[Tensor]) -> Tensor:
    """Whether no value of this rank is NaN or infinity, [] bool, without a wait."""
    return torch.stack([torch.isfinite(value).all() for value in values]).all()


def bad_rows(values: Mapping[str, Any], n_rows: int) -> dict[str, Tensor]:
    """By name which of this rank's rows hold NaN or infinity, [b] bool, without a wait.

    Numbers such as the scale belong to no row, ids are always finite, and a queue takes no key that
    is not.
    """
    masks = {}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
            continue
        # Neither is a row of the batch: keys of a queue, a number of each teacher.
        if FIELDS[name].shapes[0].startswith("Q") or FIELDS[name].is_number:
            continue

        # A column at least, so that labels [b] are like embeddings [b, D].
        finite = torch.isfinite(value).reshape(n_rows, -1)
        masks[name] = ~finite.all(1)
    return masks


def named(masks: Mapping[str, Tensor], sample_id: Tensor, keys: Sequence[str]) -> list[str]:
    """What `bad_rows` found on all ranks, in words. Collective."""
    lines = []
    for name, mask in masks.items():
        for row in mask.nonzero().flatten().tolist():
            sample = f"sample {sample_id[row].item()} ({keys[row]})"
            lines.append(f"{_described(name)} of {sample}")

    return list(chain.from_iterable(dist.gather_objects(lines)))


def message(lines: list[str], step: int) -> str:
    """The error text of a step in which `named` found these places."""
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


def _described(name: str) -> str:
    # What no tower made, such as a label or a teacher's embedding, is named alone.
    if name not in EMBEDDED:
        return name
    return f"{name} embedding ({EMBEDDED[name].tower} tower)"
