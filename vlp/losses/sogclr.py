"""Contrastive losses with a moving estimate of each sample's normaliser: they pay at small batches.

    h_ij = s_ij − s_ii,   g_i = mean_{j≠i} e^{h_ij/τ},   u_i ← (1−γ) u_i + γ g_i   (at the first visit u_i = g_i)

sogclr    (SogCLR, arXiv 2202.12387)   L = mean_i mean_{j≠i} sg(w_ij)·h_ij with w_ij = e^{h_ij/τ} / u_i, τ fixed
fastclip  (FastCLIP v3, arXiv 2407.01445)   L = mean_i [ sg(τ)·g_i / u_i + τ (log u_i + ρ) ], u detached, τ = 1 / scale
          learned by the model: at γ = 1 its exact gradient is that of the robust objective

½ of each for images (h_ij over texts) and texts, each with its own u. The state is log u, two numbers a sample (e^{h/τ}
overflows float32 at τ = .01), equal on all ranks: it is updated from the samples of the whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.losses._objective import Inputs
from vlp.pairwise import SUM, Pairs, Reduction, Tile

MIN_CANDIDATES = 2
STATE = ("log_u_image", "log_u_text")


@dataclass(frozen=True)
class Options:
    samples: int  # samples of the run's index: sample_id < samples
    variant: Literal["sogclr", "fastclip"] = "sogclr"
    temperature: float = 0.01  # τ of sogclr
    rho: float = 6.5  # ρ of fastclip: 6.5 for CC3M, 8.5 for CC12M in the paper
    gamma: float = 0.9  # γ, the weight of the batch's estimate
    gamma_end: float | None = None  # cosine from gamma to gamma_end (FastCLIP: 1 to .2) …
    gamma_steps: int = 0  # … over this many steps (FastCLIP: half the epochs)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.temperature <= 0:
            raise ValueError(f"expected samples >= 1 and temperature > 0, found {self}")
        if not all(0 < g <= 1 for g in (self.gamma, self.gamma if self.gamma_end is None else self.gamma_end)):
            raise ValueError(f"gamma and gamma_end: found {self.gamma}, {self.gamma_end}, expected 0 < γ <= 1")
        if (self.gamma_end is None) != (self.gamma_steps == 0) or self.gamma_steps < 0:
            raise ValueError("gamma_end and gamma_steps go together: give both, or neither for a constant gamma")

    def gamma_at(self, step: int) -> float:
        if self.gamma_end is None:
            return self.gamma
        progress = min(step / self.gamma_steps, 1.0)
        return self.gamma_end + (self.gamma - self.gamma_end) * (1 + math.cos(math.pi * progress)) / 2


def label(options: Options) -> str:
    return options.variant


def needs(options: Options) -> frozenset[str]:
    return frozenset({"image", "text", "sample_id"} | ({"scale"} if options.variant == "fastclip" else set()))


def initial_state(options: Options) -> dict[str, Tensor]:
    """log u of every sample and modality; −∞ for samples not seen yet."""
    return {name: torch.full((options.samples,), -torch.inf) for name in STATE}


def term(inputs: Inputs, pairs: Pairs, options: Options, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    learned = options.variant == "fastclip"
    scale = torch.as_tensor(inputs.scale if learned else 1 / options.temperature, device=inputs.image.device)
    margins = pairs.margin_logsumexp(inputs.image, inputs.text, scale)
    log_g = [q - math.log(pairs.candidates(len(q)) - 1) for q in margins]
    log_u, state = update(inputs, pairs, options, state, [g.detach() for g in log_g])
    if not learned:
        return weighted_gaps(inputs, pairs, scale, log_u), state
    temperature = 1 / scale
    terms = [temperature.detach() * (g - u).exp() + temperature * (u + options.rho) for g, u in zip(log_g, log_u)]
    return pairs.mean(sum(terms) / 2), state


def update(
    inputs: Inputs, pairs: Pairs, options: Options, state: dict[str, Tensor], log_g: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """log u of this rank's rows after the update, and the state with the updates of all ranks."""
    ids = inputs.sample_id
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < options.samples:
        raise ValueError(f"sample_id: found {int(ids.min())} to {int(ids.max())}, but samples is {options.samples}; raise it")
    γ = options.gamma_at(inputs.step or 0)
    every, updated, fresh = pairs.gather_over_ranks(ids), {}, []
    for name, log_new in zip(STATE, log_g):
        old = state[name].to(ids.device)
        seen = old[ids].to(log_new.dtype)
        mixed = torch.logaddexp(seen + (math.log(1 - γ) if γ < 1 else -math.inf), log_new + math.log(γ))
        fresh.append(torch.where(seen == -torch.inf, log_new, mixed))
        updated[name] = old.index_copy(0, every, pairs.gather_over_ranks(fresh[-1]).to(old.dtype))
    return fresh, updated


def weighted_gaps(inputs: Inputs, pairs: Pairs, scale: Tensor, log_u: list[Tensor]) -> Tensor:
    """½ Σ_modalities mean_i mean_{j≠i} sg(e^{h_ij/τ} / u_i)·h_ij."""
    wide = inputs.wide()
    own = (wide.image * wide.text).sum(1)

    def gaps(tile: Tile) -> tuple[Tensor, ...]:
        found = []
        for (diagonal, log_normaliser), axis in ((tile.row_values, 1), (tile.column_values, 0)):
            h = tile.scores[0] - diagonal.unsqueeze(axis)
            weight = (tile.shared[0] * h.detach() - log_normaliser.unsqueeze(axis)).exp()
            found.append((weight * h).masked_fill(tile.positive, 0))
        return tuple(found)

    rows, columns = pairs.reduce(
        Reduction(gaps, rows=(SUM,), columns=(SUM,)), [inputs.image], [inputs.text],
        row_values=[own, log_u[0].to(own.dtype)], column_values=[own, log_u[1].to(own.dtype)], shared=[scale.detach()],
    )  # fmt: skip
    return pairs.mean(rows + columns) / (2 * (pairs.candidates(len(own)) - 1))
