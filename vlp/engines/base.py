"""The interface of every engine, as the step and the loop use it.

    engine = engines.start(config.train)     joins the launcher's processes, chooses the device
    engine.prepare(model, config.train)      wraps the model (weights already restored) and builds
                                             the optimiser
    with engine.micro_batch(last=True):      around a forward and its backward; ranks exchange
        engine.backward(loss)                gradients at the last one only, where the engine
                                             allows it
    engine.update(lr)                        clips, updates, clears; returns the gradient's norm,
                                             and updates nothing where that is not finite
    engine.state(), engine.load_moments(…)   whole tensors by parameter name: the same for every
                                             engine and any W, whatever the optimiser keeps
    engine.average(), engine.follow(…)       a moving average of the model (vlp.teacher)

Only `vlp.step` calls backward and update. Every engine averages gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlp import config
from vlp.models.dual_encoder import DualEncoder

State = tuple[dict[str, Tensor], dict[str, Tensor]]  # (model, optimiser)


class Engine(Protocol):
    """The interface that the step and the loop rely on."""

    device: torch.device
    model: nn.Module  # embeds for training; the plain module underneath must not be called for that
    description: dict[str, Any]  # DualEncoder.description() of the model

    def prepare(self, model: DualEncoder, options: config.Train) -> None: ...
    def micro_batch(self, last: bool) -> AbstractContextManager: ...
    def backward(self, loss: Tensor) -> None: ...
    def update(self, lr: float) -> Tensor: ...
    def state(self, everywhere: bool = False) -> State: ...
    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...
    def average(self, weights: Mapping[str, Tensor] | None = None) -> nn.Module: ...
    def follow(self, average: nn.Module, decay: float, counts: Tensor) -> None: ...
    def whole(self, average: nn.Module) -> dict[str, Tensor]: ...
    def evaluation_model(self, average: nn.Module | None = None) -> DualEncoder: ...
