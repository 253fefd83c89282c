"""The interface of every engine, as the step and the loop use it.

    engine = engines.start(config.train)     joins the launcher's processes, chooses the device
    engine.prepare(model, config.train)      wraps the model (weights already restored) and builds
                                             the optimiser
    with engine.micro_batch(last=True):      around a forward and its backward; ranks exchange
        engine.backward(loss)                gradients at the last one only, where the engine
                                             allows it
    engine.update(lr)                        clips, updates, clears; returns the gradient's norm,
                                             and updates nothing where that is not finite
    engine.tensors()                         what a checkpoint holds, by parameter name: the same
                                             names and whole values for every engine and any W
    engine.lasts(name)                       whether nothing moves one of them before an update
    engine.state(), engine.load_moments(…)   the same as whole tensors on one rank, and the way back
    engine.average(), engine.follow(…)       a moving average of the model (vlp.teacher)

Only `vlp.step` calls backward and update. Every engine averages gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlp import config
from vlp.models.dual_encoder import DualEncoder

State = tuple[dict[str, Tensor], dict[str, Tensor]]  # (model, optimiser)
# "model/NAME" or "optimizer/KEY.NAME" with a tensor that is whole on every rank, or a DTensor
Named = Iterator[tuple[str, Tensor]]


class Engine(Protocol):
    """The interface that the step and the loop rely on."""

    device: torch.device
    # Whether a backward that counts nowhere has to come before the first step: see `rehearse` in
    # vlp.passes.
    rehearses: bool
    model: nn.Module  # embeds for training; the plain module underneath must not be called for that
    description: dict[str, Any]  # DualEncoder.description() of the model

    def prepare(self, model: DualEncoder, options: config.Train) -> None: ...
    def micro_batch(self, last: bool) -> AbstractContextManager: ...
    def backward(self, loss: Tensor) -> None: ...
    def update(self, lr: float) -> Tensor: ...
    def forget(self) -> None: ...
    def tensors(self) -> Named: ...
    def lasts(self, name: str) -> bool: ...
    def state(self, everywhere: bool = False) -> State: ...
    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...
    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module: ...
    def follow(self, average: nn.Module, decay: float, counts: Tensor) -> None: ...
    def evaluation_model(self, average: nn.Module | None = None) -> DualEncoder: ...


def whole(tensor: Tensor) -> Tensor:
    """All ranks' parts in one tensor; every rank must call it for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """A copy that later updates leave alone, in the order of a file."""
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@torch.no_grad()
def gathered(
    tensors: Iterable[tuple[str, Tensor]], device: torch.device | str = "cpu", keep: bool = True
) -> dict[str, Tensor]:
    """Whole copies on `device` by name, empty on ranks that `keep` nothing. Collective."""
    result = {}
    for name, value in tensors:
        # One at a time: the ranks that keep nothing never hold more than one tensor.
        value = whole(value)
        if keep:
            result[name] = copied(value, device)
    return result


def state_of(tensors: Named, keep: bool) -> State:
    """Whole copies on the CPU of what `Engine.tensors` names, where `keep`. Collective."""
    model: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, value in gathered(tensors, keep=keep).items():
        kind, _, name_of_kind = name.partition("/")
        (model if kind == "model" else moments)[name_of_kind] = value
    return model, moments
