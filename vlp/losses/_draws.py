"""Numbers that terms draw: from a hash of (seed, row, column), so that any rank, block or device
draws the same for a row, and a row's numbers need no other row's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

TABLE = 4097  # points at which a distribution's share is computed


def draws(rows: Tensor, seed: int, n: int) -> Iterator[Tensor]:
    """Three times uniform numbers in [0, 1), [b, n] float64, of rows [b] int64."""
    column = torch.arange(n, device=rows.device)
    for turn in range(3):
        state = _hash(rows.unsqueeze(1) ^ (seed & 0xFFFFFFFF))
        state = _hash(state ^ (3 * column + turn + (seed >> 32 & 0x7FFFFFFF)))
        yield state.double() / 2**32


def beta(uniform: Tensor, alpha: float) -> Tensor:
    """Numbers of Beta(α, α) from uniform ones of any shape: the quantile function."""
    steps, shares = _lower_half(alpha, uniform.device)

    # The distribution is its own mirror image: the upper half is looked up in the lower.
    lower = torch.minimum(uniform, 1 - uniform)
    place = torch.searchsorted(shares, lower.contiguous()).clamp(1, TABLE - 1)
    left, right = shares[place - 1], shares[place]
    part = (lower - left) / (right - left).clamp(min=torch.finfo(left.dtype).tiny)
    quantile = torch.lerp(steps[place - 1], steps[place], part) ** (1 / min(alpha, 1.0))
    return torch.where(uniform <= 0.5, quantile, 1 - quantile)


@functools.lru_cache(maxsize=8)
def _lower_half(alpha: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Points v = x^p of 0 <= x <= ½, p = min(α, 1), and the share of Beta(α, α) below each,
    float64.
    """
    # Below α = 1 the density of x has a pole at 0, and that of v has none.
    power = min(alpha, 1.0)
    steps = torch.linspace(0, 0.5**power, TABLE, dtype=torch.float64, device=device)
    x = steps ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    shares = torch.cumulative_trapezoid(density, steps)
    shares = torch.cat([shares.new_zeros(1), shares])
    return steps, shares / (2 * shares[-1])


def _hash(state: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers held in int64 (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    return state ^ (state >> 16)
