"""FastCLIP, versions 1 to 3 (arXiv 2407.01445): moving estimates of normalisers whose weight γ
falls along a cosine.

    v1   `sogclr` at one constant τ
    v2   `isogclr`, a learned τ_i for each sample
    v3   L = ½ Σ_directions mean_i [ sg(τ)·g_i / u_i + τ (log u_i + ρ) ],   u detached,   x, t: [b, D],
         with g_i = mean_{j≠i} e^{(s_ij − s_ii)/τ} and τ = 1 / scale learned by the model

u_i ← (1−γ) u_i + γ g_i with γ from 1 to .2 over half the run. At γ = 1 the gradient of v3, in τ
too, is that of the robust objective τ (log g_i + ρ). State: 2 numbers (8 bytes) a sample, 6 (24
bytes) with v2, on the rank that owns it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.losses import _moving
from vlp.losses._inputs import Inputs
from vlp.losses._moving import State
from vlp.pairwise import Pairs

MIN_CANDIDATES = 2
for_run = _moving.for_run


@dataclass(frozen=True)
class Options(_moving.Individual):
    """v1 keeps `temperature`, v3 has the model's; rho is theirs that learn it."""

    gamma: float = 1.0
    gamma_end: float | None = 0.2
    # v1: one constant τ; v2: one of each sample; v3: the model's own
    version: Literal["v1", "v2", "v3"] = "v3"


def needs(options: Options) -> frozenset[str]:
    return frozenset(
        {"image", "text", "sample_id"} | ({"scale"} if options.version == "v3" else set())
    )


def initial_state(options: Options) -> State:
    return (
        _moving.individual_state_of(options)
        if options.version == "v2"
        else _moving.state_of(options)
    )


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    if options.version == "v1":
        return _moving.fixed(inputs, pairs, options, state, options.temperature)
    if options.version == "v2":
        return _moving.individual(inputs, pairs, options, state)
    return _moving.learned(inputs, pairs, options, state, options.rho)
