"""iSogCLR: SogCLR with a learned temperature for each sample.

    L = ½ Σ_directions mean_i mean_{j≠i} sg(w_ij)·h_ij,   w_ij = e^{h_ij/τ_i} / u_i
    v_i ← decay·v_i + (1 − decay)·clip(log u_i + ρ − mean_{j≠i} w_ij h_ij / τ_i, ±5)
    τ_i ← clip(τ_i − lr·v_i)

x, t: [b, D] images and texts, with h and u as in `sogclr`; the loss is at the τ_i of before the
step.

Relations:
- equivalent to `sogclr` with temperature_lr 0, at the τ that every sample starts with
- `fastclip` version v2 is this loss with a falling γ

Papers:
- iSogCLR (arXiv 2305.11965): `objective: {isogclr: {temperature: 0.03, rho: 6.5}}`; ρ is FastCLIP's
  for CC3M

Needs: image, text, sample_id

Cost: two passes over the pairs; O(b·D) memory, and log u, τ and v of image and text each, 6 numbers
(24 bytes) a sample on the rank that owns it

Use: as `sogclr`, where samples have very different numbers of near relatives
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _moving, _moving_options
from vlp.losses._inputs import Inputs
from vlp.losses._moving import State
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "sample_id"})
MIN_CANDIDATES = 2
for_run = _moving_options.for_run


@dataclass(frozen=True)
class Options(_moving_options.Individual):
    pass


def exported_scale(options: Options) -> float:
    """1/τ that every sample starts with: learned ones are of samples, not of a model."""
    return 1 / options.temperature


def initial_state(options: Options) -> State:
    return _moving.individual_state_of(options)


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    """This rank's share of L, and the moved estimates and temperatures."""
    return _moving.individual(inputs, pairs, options, state)
