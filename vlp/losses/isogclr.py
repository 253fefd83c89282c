"""iSogCLR: SogCLR with a learned temperature for each sample (arXiv 2305.11965).

    L = ½ Σ_directions mean_i mean_{j≠i} sg(w_ij)·h_ij,   w_ij = e^{h_ij/τ_i} / u_i,   x, t: [b, D]
    v_i ← decay·v_i + (1 − decay)·clip(log u_i + ρ − mean_{j≠i} w_ij h_ij / τ_i, ±5),   τ_i ← clip(τ_i − lr·v_i)

with h and u as in `sogclr`; the loss is at the τ_i of before the step. State: log u, τ and v of image and text each, 6
numbers (24 bytes) a sample on the rank that owns it, see `_table`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses import _moving
from vlp.losses._moving import State
from vlp.losses._objective import Inputs
from vlp.losses._table import Table
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text", "sample_id"})
MIN_CANDIDATES = 2
for_run = _moving.for_run


@dataclass(frozen=True)
class Options(_moving.Moving):
    temperature: float = 0.03  # τ of every sample at first
    rho: float = 6.5  # ρ: the larger, the lower the temperatures
    temperature_lr: float = 0.01  # of plain descent on v
    temperature_decay: float = 0.9  # of v
    min_temperature: float = 0.005
    max_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_temperature <= self.temperature <= self.max_temperature:
            raise ValueError(f"expected 0 < min_temperature <= temperature <= max_temperature, found {self}")
        if self.temperature_lr < 0 or not 0 <= self.temperature_decay < 1:
            raise ValueError(f"expected temperature_lr >= 0 and 0 <= temperature_decay < 1, found {self}")

    def learning(self) -> _moving.Individual:
        return _moving.Individual(
            start=self.temperature, rho=self.rho, lr=self.temperature_lr, decay=self.temperature_decay,
            lowest=self.min_temperature, highest=self.max_temperature,
        )  # fmt: skip


def initial_state(options: Options) -> State:
    return {"samples": Table(options.learning().fill, options.samples)}


def term(inputs: Inputs, pairs: Pairs, options: Options, state: State) -> tuple[Tensor, State]:
    return _moving.individual(inputs, pairs, options, state, options.learning())
