"""SogCLR: a contrastive loss with a moving estimate of each sample's normaliser.

    L = ½ Σ_directions mean_i mean_{j≠i} sg(e^{h_ij/τ} / u_i)·h_ij,   h_ij = s_ij − s_ii
    u_i ← (1−γ) u_i + γ mean_{j≠i} e^{h_ij/τ}   (at the first visit the mean itself)

x, t: [b, D] images and texts, s_ij = x_i·t_j, sg the stop-gradient; τ is fixed. The estimate makes
up for a small batch.

Relations:
- at γ = 1 the gradient is τ times that of `decoupled`
- `isogclr` learns a τ for each sample; `fastclip` lets γ fall along a cosine

Papers:
- SogCLR (arXiv 2202.12387): `objective: {sogclr: {temperature: 0.01, gamma: 0.9}}`

Needs: image, text, sample_id

Cost: two passes over the pairs; O(b·D) memory, and log u, 2 numbers (8 bytes) a sample on the rank
that owns it

Use: with few candidates a row, over data that is seen for several epochs
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
class Options(_moving_options.Moving):
    temperature: float = 0.01  # τ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def exported_scale(options: Options) -> float:
    """1/τ."""
    return 1 / options.temperature


def initial_state(options: Options) -> State:
    return _moving.state_of(options)


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    """This rank's share of L, and the moved estimates."""
    return _moving.fixed(inputs, pairs, options, state, options.temperature)
