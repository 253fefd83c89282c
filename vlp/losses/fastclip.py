"""FastCLIP, versions 1 to 3: moving estimates of normalisers whose weight γ falls along a cosine.

    v1   `sogclr` at one constant τ
    v2   `isogclr`, a learned τ_i for each sample
    v3   L = ½ Σ_directions mean_i [ sg(τ)·g_i / u_i + τ (log u_i + ρ) ],   u detached,
         with g_i = mean_{j≠i} e^{(s_ij − s_ii)/τ} and τ = 1 / scale learned by the model

x, t: [b, D] images and texts, s_ij = x_i·t_j, sg the stop-gradient; u_i ← (1−γ) u_i + γ g_i with γ
from 1 to .2 over half the run.

Relations:
- at γ = 1 the gradient of v3, in τ too, is that of the robust objective τ (log g_i + ρ)
- v1 and v2 with a constant γ are `sogclr` and `isogclr`

Papers:
- FastCLIP (arXiv 2407.01445) on CC3M: `objective: {fastclip: {version: v3, rho: 6.5}}`
- FastCLIP on CC12M: `objective: {fastclip: {version: v3, rho: 8.5}}`

Needs: image, text, sample_id, scale; v1 and v2 no scale

Cost: one pass over the pairs for v3, two for v1 and v2; O(b·D) memory, and 2 numbers (8 bytes) a
sample, 6 (24 bytes) with v2, on the rank that owns it

Use: at small batches; the paper's tables gain 2 to 4 points there
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlp.losses import _moving, _moving_options
from vlp.losses._inputs import Inputs
from vlp.losses._moving import State
from vlp.pairwise import Pairs

MIN_CANDIDATES = 2
for_run = _moving_options.for_run


@dataclass(frozen=True)
class Options(_moving_options.Individual):
    """v1 keeps `temperature`, v3 has the model's; rho is theirs that learn it."""

    gamma: float = 1.0
    gamma_end: float | None = 0.2
    # v1: one constant τ; v2: one of each sample; v3: the model's own
    version: Literal["v1", "v2", "v3"] = "v3"


def needs(options: Options) -> frozenset[str]:
    # v1 and v2 have temperatures of their own.
    scale = {"scale"} if options.version == "v3" else set()
    return frozenset({"image", "text", "sample_id"} | scale)


def initial_state(options: Options) -> State:
    if options.version == "v2":
        return _moving.individual_state_of(options)
    return _moving.state_of(options)


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    """This rank's share of L, and the moved estimates (and, with v2, temperatures)."""
    # The versions differ in what τ is: a constant, a number of each sample, the model's.
    if options.version == "v1":
        return _moving.fixed(inputs, pairs, options, state, options.temperature)
    if options.version == "v2":
        return _moving.individual(inputs, pairs, options, state)
    return _moving.learned(inputs, pairs, options, state, options.rho)
