"""iSogCLR: SogCLR with a learned temperature for each sample (arXiv 2305.11965).

    L = ½ Σ_directions mean_i mean_{j≠i} sg(w_ij)·h_ij,   w_ij = e^{h_ij/τ_i} / u_i,   x, t: [b, D]
    v_i ← decay·v_i + (1 − decay)·clip(log u_i + ρ − mean_{j≠i} w_ij h_ij / τ_i, ±5),   τ_i ← clip(τ_i − lr·v_i)

with h and u as in `sogclr`; the loss is at the τ_i of before the step. State: log u, τ and v of
image and text each, 6 numbers (24 bytes) a sample on the rank that owns it, see `_table`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _moving
from vlp.losses._inputs import Inputs
from vlp.losses._moving import State
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "sample_id"})
MIN_CANDIDATES = 2
for_run = _moving.for_run


@dataclass(frozen=True)
class Options(_moving.Individual):
    pass


def initial_state(options: Options) -> State:
    return _moving.individual_state_of(options)


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    return _moving.individual(inputs, pairs, options, state)
