"""Contrastive losses with a moving estimate of each sample's normaliser, for sogclr, isogclr and
fastclip.

    h_ij = s_ij − s_ii,   g_i = mean_{j≠i} e^{h_ij/τ_i},   u_i ← (1−γ) u_i + γ g_i   (at the first visit u_i = g_i)

    fixed, individual   L = mean_i mean_{j≠i} sg(w_ij)·h_ij,   w_ij = e^{h_ij/τ_i} / u_i
    learned             L = mean_i [ sg(τ)·g_i / u_i + τ (log u_i + ρ) ],   u detached

½ of each for images (h_ij over texts) and texts, each with its own u and τ. Kept is log u: e^{h/τ}
overflows float32 at τ = .01. Each function takes and returns `{"samples": Table}`, see `_table`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._table import Table, Write
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Reduction, Tile

State = dict[str, Table | Write]
LOG_U, TEMPERATURE, MOMENTUM = (
    slice(0, 2),
    slice(2, 4),
    slice(4, 6),
)  # columns of a table, for image and text each
UNSEEN = (-math.inf, -math.inf)  # log u of a sample not met yet
LARGEST_GRADIENT = 5.0  # of a temperature


@dataclass(frozen=True)
class Moving:
    """Keys of every such loss."""

    samples: int | None = (
        None  # in the run's index: sample_id < samples; null: `vlp train` fills it in
    )
    gamma: float = 0.9  # γ, the weight of the batch's estimate
    gamma_end: float | None = None  # cosine from gamma to gamma_end …
    gamma_steps: int | None = (
        None  # … over this many steps; null: half the run's, which `vlp train` fills in
    )

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"samples: found {self.samples}, expected at least 1, or null")
        if not all(
            0 < g <= 1
            for g in (self.gamma, self.gamma if self.gamma_end is None else self.gamma_end)
        ):
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
        progress = min(step / self.gamma_steps, 1.0)
        return (
            self.gamma_end + (self.gamma - self.gamma_end) * (1 + math.cos(math.pi * progress)) / 2
        )


@dataclass(frozen=True)
class Individual(Moving):
    """Keys of a loss that learns a temperature for each sample: τ_i ← clip(τ_i − lr·v_i), v_i the
    moving mean of its gradient, clipped at ±5.
    """

    temperature: float = 0.03  # τ of every sample at first
    rho: float = (
        6.5  # ρ: the larger, the lower the temperatures (6.5 for CC3M, 8.5 for CC12M in FastCLIP)
    )
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
        return (temperature - self.temperature_lr * momentum).clamp(
            self.min_temperature, self.max_temperature
        ), momentum


AnyMoving = TypeVar("AnyMoving", bound=Moving)


def for_run(options: AnyMoving, samples: int | None, steps: int | None) -> AnyMoving:
    """The options with what only the run knows, where the configuration leaves it open."""
    if options.samples is None:
        options = replace(options, samples=samples)
    if options.gamma_end is None or steps is None:
        return options
    if options.gamma_steps is None:
        return replace(options, gamma_steps=max(steps // 2, 1))
    if options.gamma_steps > steps:
        raise ValueError(
            f"gamma_steps is {options.gamma_steps:,}, but the run has {steps:,} steps: γ would never reach gamma_end; lower it, "
            "or leave it out for half the run"
        )
    return options


def state_of(options: Moving) -> State:
    """log u of image and text."""
    return {"samples": Table(UNSEEN, options.samples)}


def individual_state_of(options: Individual) -> State:
    """log u, τ and v of image and text."""
    return {
        "samples": Table(
            (*UNSEEN, options.temperature, options.temperature, 0.0, 0.0), options.samples
        )
    }


def fixed(
    inputs: Inputs, pairs: Pairs, options: Moving, state: State, temperature: float
) -> tuple[Tensor, State]:
    """One constant τ for all samples."""
    old = _read(inputs, state)
    log_g = _uniform_log_estimates(inputs, pairs, 1 / temperature)
    log_u = _moved(old[:, LOG_U], log_g.detach(), options.gamma_at(inputs.step or 0))
    gaps = weighted_gaps(inputs, pairs, torch.full_like(log_u, 1 / temperature), log_u)
    loss = pairs.mean(gaps.sum(1)) / 2
    return loss, _write(inputs, pairs, state, log_u, loss)


def individual(
    inputs: Inputs, pairs: Pairs, options: Individual, state: State
) -> tuple[Tensor, State]:
    """A τ for each sample and modality, whose gradient is log u_i + ρ − mean_{j≠i} w_ij h_ij / τ_i."""
    old = _read(inputs, state)
    temperature = old[:, TEMPERATURE]
    log_g = _individual_log_estimates(inputs, pairs, 1 / temperature)
    log_u = _moved(old[:, LOG_U], log_g, options.gamma_at(inputs.step or 0))
    gaps = weighted_gaps(inputs, pairs, 1 / temperature, log_u)
    gradient = log_u + options.rho - gaps.detach() / temperature
    new = torch.cat([log_u, *options.descend(temperature, old[:, MOMENTUM], gradient)], 1)
    loss = pairs.mean(gaps.sum(1)) / 2
    return loss, _write(inputs, pairs, state, new, loss)


def learned(
    inputs: Inputs, pairs: Pairs, options: Moving, state: State, rho: float
) -> tuple[Tensor, State]:
    """One τ = 1 / scale that the model learns. At γ = 1 its exact gradient is that of the robust
    objective.
    """
    old = _read(inputs, state)
    log_g = _uniform_log_estimates(inputs, pairs, inputs.scale)
    log_u = _moved(old[:, LOG_U], log_g.detach(), options.gamma_at(inputs.step or 0))
    temperature = 1 / torch.as_tensor(inputs.scale, device=log_u.device)
    value = temperature.detach() * (log_g - log_u).exp() + temperature * (log_u + rho)
    loss = pairs.mean(value.sum(1)) / 2
    return loss, _write(inputs, pairs, state, log_u, loss)


def weighted_gaps(inputs: Inputs, pairs: Pairs, inverse: Tensor, log_u: Tensor) -> Tensor:
    """mean_{j≠i} sg(e^{h_ij/τ_i} / u_i)·h_ij, [b, 2] for images and texts. inverse: 1/τ, [b, 2] as
    log_u.
    """

    def gaps(tile: Tile) -> tuple[Tensor, ...]:
        found = []
        for (own, inverse, log_u), axis in ((tile.row_values, 1), (tile.column_values, 0)):
            h = tile.scores[0] - own.unsqueeze(axis)
            exponent = inverse.unsqueeze(axis) * h.detach() - log_u.unsqueeze(axis)
            found.append(
                exponent.masked_fill(tile.positive, -torch.inf).exp() * h
            )  # the pair itself could overflow
        return tuple(found)

    return _sums(
        inputs, pairs, Reduction(gaps, rows=(SUM,), columns=(SUM,)), inverse, log_u
    ) / _others(inputs, pairs)


def _uniform_log_estimates(inputs: Inputs, pairs: Pairs, scale: Tensor | float) -> Tensor:
    """log g, [b, 2], at one temperature: the fused reduction."""
    margins = pairs.margin_logsumexp(inputs.image, inputs.text, scale)
    return torch.stack(margins, 1) - math.log(_others(inputs, pairs))


@torch.no_grad()
def _individual_log_estimates(inputs: Inputs, pairs: Pairs, inverse: Tensor) -> Tensor:
    def exponents(tile: Tile) -> tuple[Tensor, ...]:
        return tuple(
            (inverse.unsqueeze(axis) * (tile.scores[0] - own.unsqueeze(axis))).masked_fill(
                tile.positive, -torch.inf
            )
            for (own, inverse), axis in ((tile.row_values, 1), (tile.column_values, 0))
        )

    reduction = Reduction(exponents, rows=(LOGSUMEXP,), columns=(LOGSUMEXP,))
    return _sums(inputs, pairs, reduction, inverse) - math.log(_others(inputs, pairs))


def _sums(inputs: Inputs, pairs: Pairs, reduction: Reduction, *values: Tensor) -> Tensor:
    """A reduction whose tiles see s_ii and `values` [b, 2] of their rows (first column) and columns
    (second): [b, 2].
    """
    wide = inputs.wide()
    own = (wide.image * wide.text).sum(1)
    by_row, by_column = ([own, *(v[:, side].to(own.dtype) for v in values)] for side in (0, 1))
    found = pairs.reduce(
        reduction, [inputs.image], [inputs.text], row_values=by_row, column_values=by_column
    )
    return torch.stack(found, 1)


def _moved(log_u: Tensor, log_g: Tensor, γ: float) -> Tensor:
    """log((1−γ) u + γ g), and log g at the first visit."""
    mixed = torch.logaddexp(log_u + (math.log(1 - γ) if γ < 1 else -math.inf), log_g + math.log(γ))
    return torch.where(log_u == -torch.inf, log_g, mixed)


def _others(inputs: Inputs, pairs: Pairs) -> int:
    return pairs.candidates(len(inputs.image)) - 1


def _read(inputs: Inputs, state: State) -> Tensor:
    return state["samples"].read(inputs.sample_id).double()


def _write(inputs: Inputs, pairs: Pairs, state: State, values: Tensor, loss: Tensor) -> State:
    """The new numbers [b, c] of the rows; none where the loss of any rank is not finite (a table
    leaves NaN out), since an infinite row may leave other rows' sums finite and wrong.
    """
    n_broken = pairs.sum_over_ranks((~loss.detach().isfinite()).to(values.dtype))
    return {
        "samples": Write(
            state["samples"], inputs.sample_id, torch.where(n_broken > 0, torch.nan, values)
        )
    }
