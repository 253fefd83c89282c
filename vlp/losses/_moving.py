"""Contrastive losses with a moving estimate of each sample's normaliser: `sogclr` and its family.

    h_ij = s_ij − s_ii,   g_i = mean_{j≠i} e^{h_ij/τ_i}
    u_i ← (1−γ) u_i + γ g_i   (at the first visit u_i = g_i)

    fixed, individual   L = mean_i mean_{j≠i} sg(w_ij)·h_ij,   w_ij = e^{h_ij/τ_i} / u_i
    learned             L = mean_i [ sg(τ)·g_i / u_i + τ (log u_i + ρ) ],   u detached

½ of each for images (h_ij over texts) and texts, each with its own u and τ. Kept is log u: e^{h/τ}
overflows float32 at τ = .01. Each function takes and returns `{"samples": Table}`, see `_table`;
tensors [b, 2] below hold the number of each row's image, then of its text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._moving_options import Individual, Moving
from vlp.losses._table import Table, Write
from vlp.pairwise import LOGSUMEXP, SUM, Pairs, Reduction, Tile

State = dict[str, Table | Write]
# columns of a table, for image and text each
LOG_U, TEMPERATURE, MOMENTUM = slice(0, 2), slice(2, 4), slice(4, 6)
UNSEEN = (-math.inf, -math.inf)  # log u of a sample not met yet


def state_of(options: Moving) -> State:
    """log u of image and text."""
    return {"samples": Table(UNSEEN, options.samples)}


def individual_state_of(options: Individual) -> State:
    """log u, τ and v of image and text."""
    τ = options.temperature
    return {"samples": Table((*UNSEEN, τ, τ, 0.0, 0.0), options.samples)}


# The three losses


def fixed(
    inputs: Inputs, pairs: Pairs, options: Moving, state: State, temperature: float
) -> tuple[Tensor, State]:
    """One constant τ for all samples."""
    old = _read(inputs, state)
    log_g = _uniform_log_estimates(inputs, pairs, 1 / temperature)
    log_u = _moved(old[:, LOG_U], log_g.detach(), options.gamma_at(inputs.step or 0))

    gaps = weighted_gaps(inputs, pairs, torch.full_like(log_u, 1 / temperature), log_u)
    loss = pairs.mean(gaps.sum(1)) / 2
    return loss, _write(inputs, state, log_u)


def individual(
    inputs: Inputs, pairs: Pairs, options: Individual, state: State
) -> tuple[Tensor, State]:
    """A τ for each sample and modality.

    Its gradient is log u_i + ρ − mean_{j≠i} w_ij h_ij / τ_i; the loss is at the τ_i of before.
    """
    # Estimates first, at the temperatures of before the step.
    old = _read(inputs, state)
    temperature = old[:, TEMPERATURE]
    log_g = _individual_log_estimates(inputs, pairs, 1 / temperature)
    log_u = _moved(old[:, LOG_U], log_g, options.gamma_at(inputs.step or 0))

    gaps = weighted_gaps(inputs, pairs, 1 / temperature, log_u)
    loss = pairs.mean(gaps.sum(1)) / 2

    # The temperatures descend by hand: no optimiser knows the numbers of samples.
    gradient = log_u + options.rho - gaps.detach() / temperature
    new = torch.cat([log_u, *options.descend(temperature, old[:, MOMENTUM], gradient)], 1)
    return loss, _write(inputs, state, new)


def learned(
    inputs: Inputs, pairs: Pairs, options: Moving, state: State, rho: float
) -> tuple[Tensor, State]:
    """One τ = 1 / scale that the model learns.

    At γ = 1 its exact gradient is that of the robust objective.
    """
    old = _read(inputs, state)
    log_g = _uniform_log_estimates(inputs, pairs, inputs.scale)
    log_u = _moved(old[:, LOG_U], log_g.detach(), options.gamma_at(inputs.step or 0))

    # g carries the gradients of embeddings and τ, the second summand the rest of τ's.
    scale = inputs.scale
    temperature = 1 / (scale if isinstance(scale, Tensor) else torch.full_like(log_u[0, 0], scale))
    value = temperature.detach() * (log_g - log_u).exp() + temperature * (log_u + rho)
    loss = pairs.mean(value.sum(1)) / 2
    return loss, _write(inputs, state, log_u)


# What they are made of


def weighted_gaps(
    inputs: Inputs,
    pairs: Pairs,
    inverse: Tensor,  # 1/τ, [b, 2]
    log_u: Tensor,  # [b, 2]
) -> Tensor:
    """mean_{j≠i} sg(e^{h_ij/τ_i} / u_i)·h_ij, [b, 2]."""

    def gaps(tile: Tile) -> tuple[Tensor, ...]:
        results = []
        for cosine, inverse, log_u in _sides(tile):
            h = tile.scores[0] - cosine
            exponent = inverse * h.detach() - log_u
            # Masked before the exponential: the pair itself could overflow.
            weights = exponent.masked_fill(tile.positive, -torch.inf).exp()
            results.append(weights * h)
        return tuple(results)

    reduction = Reduction(gaps, rows=(SUM,), columns=(SUM,))
    return _statistics(inputs, pairs, reduction, inverse, log_u) / _n_others(inputs, pairs)


def _uniform_log_estimates(inputs: Inputs, pairs: Pairs, scale: Tensor | float) -> Tensor:
    """log g, [b, 2], at one temperature: the fused reduction."""
    margins = pairs.margin_logsumexp(inputs.image, inputs.text, scale)
    return torch.stack(margins, 1) - math.log(_n_others(inputs, pairs))


@torch.no_grad()
def _individual_log_estimates(inputs: Inputs, pairs: Pairs, inverse: Tensor) -> Tensor:
    """log g, [b, 2], at a temperature for each sample. inverse: 1/τ, [b, 2]."""

    def exponents(tile: Tile) -> tuple[Tensor, ...]:
        results = []
        for cosine, inverse in _sides(tile):
            exponent = inverse * (tile.scores[0] - cosine)
            results.append(exponent.masked_fill(tile.positive, -torch.inf))
        return tuple(results)

    reduction = Reduction(exponents, rows=(LOGSUMEXP,), columns=(LOGSUMEXP,))
    log_sums = _statistics(inputs, pairs, reduction, inverse)
    return log_sums - math.log(_n_others(inputs, pairs))


def _sides(tile: Tile) -> Iterator[tuple[Tensor, ...]]:
    """The values of the tile's rows as columns [m, 1], then those of its columns as rows [1, n]."""
    yield tuple(values.unsqueeze(1) for values in tile.row_values)
    yield tuple(values.unsqueeze(0) for values in tile.column_values)


def _statistics(inputs: Inputs, pairs: Pairs, reduction: Reduction, *values: Tensor) -> Tensor:
    """A reduction, [b, 2], whose tiles see s_ii and `values` [b, 2].

    Rows bring the first column of each, columns the second.
    """
    wide = inputs.wide()
    cosine = (wide.image * wide.text).sum(1)
    by_row, by_column = (
        [cosine, *(value[:, side].to(cosine.dtype) for value in values)] for side in (0, 1)
    )
    statistics = pairs.reduce(
        reduction, [inputs.image], [inputs.text], row_values=by_row, column_values=by_column
    )
    return torch.stack(statistics, 1)


def _moved(log_u: Tensor, log_g: Tensor, γ: float) -> Tensor:
    """log((1−γ) u + γ g), and log g at the first visit."""
    # In logarithms: at τ = .01 neither u nor g fits float32.
    log_rest = math.log(1 - γ) if γ < 1 else -math.inf
    mixed = torch.logaddexp(log_u + log_rest, log_g + math.log(γ))
    return torch.where(log_u == -torch.inf, log_g, mixed)


def _n_others(inputs: Inputs, pairs: Pairs) -> int:
    return pairs.candidates(len(inputs.image)) - 1


# The numbers of each sample


def _read(inputs: Inputs, state: State) -> Tensor:
    table = state["samples"]
    assert isinstance(table, Table)  # a `Write` is what a term returns
    return table.read(inputs.sample_id).double()


def _write(inputs: Inputs, state: State, values: Tensor) -> State:
    """The new numbers [b, c] of the rows."""
    table = state["samples"]
    assert isinstance(table, Table)
    return {"samples": Write(table, inputs.sample_id, values)}
