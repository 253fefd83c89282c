"""Draws of the von Mises–Fisher distribution, differentiable in direction and concentration.

The density of z on the unit sphere is ∝ e^{κ μ·z}. A draw is

    z = cos θ·μ + sin θ·v,    v uniform among the unit directions orthogonal to μ

and the angle θ has the density f(θ) ∝ e^{κ cos θ} sin^{D−2} θ. The usual sampler (Wood 1994)
rejects proposals, so that how many numbers it takes depends on κ, and what it accepts has no exact
gradient in κ. Here θ is the quantile of a uniform number, from f on a grid, with the gradient of
that quantile

    dθ/dκ = −(1/f(θ)) ∫_0^θ f(t)·(cos t − E cos θ) dt

so that rows, samples and devices draw the same numbers, and gradients are those of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.losses._draws import draws

GRID = 1025  # points of f a row
ROWS = 512  # whose densities are held at once
_SPREADS = 10.0  # standard deviations around the mode that the grid covers, as far as there is room


def samples(
    mean: Tensor,  # μ [b, D] unit rows
    concentration: Tensor,  # κ [b], > 0
    rows: Tensor,  # [b] int64, of which row of the step each is
    seeds: list[int],  # of each draw
) -> Iterator[Tensor]:
    """A draw of each row for each seed, [b, D] unit rows; the same for one (row, seed)."""
    uniform = torch.stack([list(draws(rows, seed, 1))[2][:, 0] for seed in seeds], 1)
    # A chunk of rows at a time: a row holds about 90 KB of its density.
    chunks = zip(uniform.split(ROWS), concentration.split(ROWS))
    angles = torch.cat([angle(*chunk, mean.shape[1]) for chunk in chunks]).to(mean.dtype)
    for seed, theta in zip(seeds, angles.unsqueeze(2).unbind(1)):
        first, second, _ = draws(rows, seed, mean.shape[1])
        normal = (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
        normal = normal.to(mean.dtype)

        along = (normal * mean).sum(1, keepdim=True)
        orthogonal = F.normalize(normal - along * mean, dim=1)
        yield theta.cos() * mean + theta.sin() * orthogonal


def angle(
    uniform: Tensor,  # [b, S] in [0, 1)
    concentration: Tensor,  # κ [b]
    width: int,  # D
) -> Tensor:
    """The quantiles θ [b, S] of uniform numbers, float64, with their gradient in κ."""
    kappa = concentration.detach().double()
    grid, density = _on_grid(kappa, width)
    shares = _integral(density, grid)
    mass = shares[:, -1:]
    shares = shares / mass

    # Between two points f is taken for constant.
    place = torch.searchsorted(shares, uniform.double()).clamp(1, GRID - 1)
    (left, right), (below, above) = _around(grid, place), _around(shares, place)
    part = (uniform.double() - below) / (above - below).clamp(min=_TINY)
    theta = torch.lerp(left, right, part.clamp(0, 1))

    cosines = grid.cos()
    expectation = _integral(density * cosines, grid)[:, -1:] / mass
    moved = _integral(density * (cosines - expectation), grid) / mass
    moved_at_theta = torch.lerp(*_around(moved, place), part.clamp(0, 1))
    density_at_theta = (above - below) / (right - left)
    slope = -moved_at_theta / density_at_theta.clamp(min=_TINY)
    # The value of the first, and the gradient of the second.
    return theta + slope * (concentration.double() - kappa).unsqueeze(1)


_TINY = torch.finfo(torch.float64).tiny


def _around(values: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Of values [b, GRID] those before and at the places [b, S]."""
    return values.gather(1, place - 1), values.gather(1, place)


def _on_grid(kappa: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Angles [b, GRID] around the mode, and f there, its largest value 1."""
    power = width - 2
    # Where f is largest: κ sin² θ = (D − 2) cos θ.
    cosine = 2 * kappa / (power + (power**2 + 4 * kappa**2).sqrt())
    mode = cosine.clamp(max=1).acos()
    falling = kappa * cosine + power / mode.sin().clamp(min=1e-150) ** 2
    spread = _SPREADS / falling.sqrt()

    low, high = (mode - spread).clamp(min=0), (mode + spread).clamp(max=math.pi)
    steps = torch.linspace(0, 1, GRID, dtype=kappa.dtype, device=kappa.device)
    grid = torch.lerp(low.unsqueeze(1), high.unsqueeze(1), steps)
    # Of cos θ − 1 in this form nothing cancels.
    log_density = -2 * kappa.unsqueeze(1) * (grid / 2).sin() ** 2
    log_density = log_density + torch.xlogy(torch.full_like(grid, power), grid.sin().clamp(min=0))
    return grid, (log_density - log_density.amax(1, keepdim=True)).exp()


def _integral(values: Tensor, grid: Tensor) -> Tensor:
    """∫ from the first point to each, by trapezia, [b, GRID]."""
    return F.pad(torch.cumulative_trapezoid(values, grid, dim=1), (1, 0))
