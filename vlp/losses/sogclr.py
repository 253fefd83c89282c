"""SogCLR: a contrastive loss with a moving estimate of each sample's normaliser (arXiv 2202.12387).

    L = ½ Σ_directions mean_i mean_{j≠i} sg(e^{h_ij/τ} / u_i)·h_ij,   h_ij = s_ij − s_ii,   x, t: [b, D]
    u_i ← (1−γ) u_i + γ mean_{j≠i} e^{h_ij/τ}   (at the first visit the mean itself)

τ is fixed. The estimate makes up for a small batch; at γ = 1 the gradient is τ times that of
`decoupled`. State: log u, 2 numbers (8 bytes) a sample on the rank that owns it, see `_table`.
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
class Options(_moving.Moving):
    temperature: float = 0.01  # τ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def initial_state(options: Options) -> State:
    return _moving.state_of(options)


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    return _moving.fixed(inputs, pairs, options, state, options.temperature)
