"""Keys of the losses with a moving estimate of each sample's normaliser (see `_moving`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

LARGEST_GRADIENT = 5.0  # of a temperature


@dataclass(frozen=True)
class Moving:
    """Keys of every such loss."""

    # in the run's index: sample_id < samples; null: `vlp train` fills it in
    samples: int | None = None
    gamma: float = 0.9  # γ, the weight of the batch's estimate
    gamma_end: float | None = None  # cosine from gamma to gamma_end …
    # … over this many steps; null: half the run's, which `vlp train` fills in
    gamma_steps: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected at least 1, or null")

        end = self.gamma if self.gamma_end is None else self.gamma_end
        if not (0 < self.gamma <= 1 and 0 < end <= 1):
            raise ValueError(
                f"gamma and gamma_end: found {self.gamma}, {self.gamma_end}, expected 0 < γ <= 1"
            )
        if self.gamma_steps is not None and (self.gamma_end is None or self.gamma_steps < 1):
            raise ValueError(
                f"gamma_steps: found {self.gamma_steps}; give at least 1, together with gamma_end"
            )

    def gamma_at(self, step: int) -> float:
        """γ of a step; with an unknown number of steps it stays at `gamma`."""
        if self.gamma_end is None or self.gamma_steps is None:
            return self.gamma

        # The cosine ends at gamma_steps and stays there.
        progress = min(step / self.gamma_steps, 1.0)
        cosine = 1 + math.cos(math.pi * progress)
        return self.gamma_end + (self.gamma - self.gamma_end) * cosine / 2


@dataclass(frozen=True)
class Individual(Moving):
    """Keys of a loss that learns a temperature for each sample.

    τ_i ← clip(τ_i − lr·v_i), v_i the moving mean of its gradient, clipped at ±5.
    """

    temperature: float = 0.03  # τ of every sample at first
    # ρ: the larger, the lower the temperatures (6.5 for CC3M, 8.5 for CC12M in FastCLIP)
    rho: float = 6.5
    temperature_lr: float = 0.01  # learning rate of the temperatures
    temperature_decay: float = 0.9  # of v
    min_temperature: float = 0.005  # lower bound of every τ_i
    max_temperature: float = 1.0  # upper bound of every τ_i

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(
                f"expected 0 < min_temperature <= temperature <= max_temperature, found {self}"
            )
        if self.temperature_lr < 0 or not 0 <= self.temperature_decay < 1:
            raise ValueError(
                f"expected temperature_lr >= 0 and 0 <= temperature_decay < 1, found {self}"
            )

    def descend(
        self, temperature: Tensor, momentum: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """τ and v after a step."""
        decay, limit = self.temperature_decay, LARGEST_GRADIENT
        momentum = decay * momentum + (1 - decay) * gradient.clamp(-limit, limit)
        moved = temperature - self.temperature_lr * momentum
        return moved.clamp(self.min_temperature, self.max_temperature), momentum


AnyMoving = TypeVar("AnyMoving", bound=Moving)


def for_run(options: AnyMoving, samples: int | None, steps: int | None) -> AnyMoving:
    """The options with what only the run knows, where the configuration leaves it open.

    ValueError where γ would never reach gamma_end, or samples would have no place.
    """
    if options.samples is None:
        options = replace(options, samples=samples)
    elif samples is not None and options.samples < samples:
        raise ValueError(
            f"samples is {options.samples:,}, but the run has {samples:,}: "
            "leave it out, or raise it"
        )
    if options.gamma_end is None or steps is None:
        return options

    # Half the run, as FastCLIP does.
    if options.gamma_steps is None:
        return replace(options, gamma_steps=max(steps // 2, 1))
    if options.gamma_steps > steps:
        raise ValueError(
            f"gamma_steps is {options.gamma_steps:,}, but the run has {steps:,} steps: γ would "
            "never reach gamma_end; lower it, or leave it out for half the run"
        )
    return options
