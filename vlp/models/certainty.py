"""How certain the embeddings of a frozen model are, by an adapter (ProbVLM, arXiv 2307.00398).

Each embedding e, [rows, D], is given a generalised Gaussian for each of its numbers, with the mean
μ, scale α and shape β of a small network:

    p(e) = Π_d β / (2α Γ(1/β)) · exp(−(|e_d − μ_d|/α)^β),    variance α² Γ(3/β)/Γ(1/β)

β = 2 is a Gaussian, β = 1 a Laplace distribution. Trained is, as means over rows and numbers,

    L = Σ_sides |μ − e| + .05·NLL(e; μ, α, β) + 10⁻⁴·NLL(e'; μ, α, β)

e' being the other side's embedding of the pair. (The release has |r|·β/α in place of (|r|/α)^β.)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDES = ("image", "text")
OWN_WEIGHT, CROSS_WEIGHT = 0.05, 1e-4  # of the likelihoods beside |μ − e|
_LEAST_SCALE, _SHAPES = 1e-4, (0.2, 8.0)  # bounds of α and of β
_TINY = 1e-12  # of |r|/α: below it the power has no gradient


class Distribution(NamedTuple):
    """Of rows of embeddings, [rows, D] each."""

    mean: Tensor
    scale: Tensor  # α
    shape: Tensor  # β


@dataclass(frozen=True)
class Form:
    """How an adapter is made, and whose embeddings it is for."""

    width: int  # D
    hidden: int = 256
    layers: int = 3
    dropout: float = 0.1
    model: str = ""  # reference of the frozen model
    weights: str = ""  # a hash of its weights; "": not known

    def __post_init__(self) -> None:
        if min(self.width, self.hidden, self.layers) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"an adapter cannot be made so: {self}")


class Adapter(nn.Module):
    """Embeddings of one side, [rows, D] → their distributions."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for place in range(form.layers):
            n_inputs = form.hidden if place else form.width
            layers += [nn.Linear(n_inputs, form.hidden), nn.ReLU(), nn.Dropout(form.dropout)]
        self.trunk = nn.Sequential(*layers)
        self.mean, self.scale, self.shape = (nn.Linear(form.hidden, form.width) for _ in range(3))

        # At the start a Gaussian, about as wide as a number of a unit row is large.
        nn.init.constant_(self.scale.bias, _inverse_softplus(form.width**-0.5))
        nn.init.constant_(self.shape.bias, _inverse_softplus(2.0))

    def forward(self, rows: Tensor) -> Distribution:
        hidden = self.trunk(rows)
        scale = F.softplus(self.scale(hidden)) + _LEAST_SCALE
        return Distribution(
            self.mean(hidden), scale, F.softplus(self.shape(hidden)).clamp(*_SHAPES)
        )


class Adapters(nn.Module):
    """An adapter for each side of a model."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.sides = nn.ModuleDict({side: Adapter(form) for side in SIDES})

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """L of pairs, [rows, D] each."""
        total = image.new_zeros(())
        for side, rows, paired in (("image", image, text), ("text", text, image)):
            distribution = self.sides[side](rows)
            total = total + (distribution.mean - rows).abs().mean()
            total = total + OWN_WEIGHT * negative_log_likelihood(rows, distribution).mean()
            total = total + CROSS_WEIGHT * negative_log_likelihood(paired, distribution).mean()
        return total

    @torch.no_grad()
    def certainty(self, side: str, rows: Tensor) -> Tensor:
        """−log of the mean variance of each row, [rows]: higher is more certain."""
        return -variance(self.sides[side](rows)).mean(1).log()


def negative_log_likelihood(values: Tensor, distribution: Distribution) -> Tensor:
    """−log p of each number, of the shape of `values`."""
    ratio = ((values - distribution.mean).abs() / distribution.scale).clamp(min=_TINY)
    power = ratio**distribution.shape
    return (
        power
        - (distribution.shape / (2 * distribution.scale)).log()
        + torch.lgamma(1 / distribution.shape)
    )


def variance(distribution: Distribution) -> Tensor:
    """α² Γ(3/β)/Γ(1/β)."""
    gammas = torch.lgamma(3 / distribution.shape) - torch.lgamma(1 / distribution.shape)
    return distribution.scale**2 * gammas.exp()


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))


def save(adapters: Adapters, path: Path) -> None:
    """Write adapters as safetensors, with their form; whole or not at all."""
    from safetensors.torch import save as as_bytes

    from vlp.files import write_atomically

    form = json.dumps(asdict(adapters.form))
    write_atomically(path, as_bytes(adapters.state_dict(), {"form": form}))


def load(path: Path | str) -> Adapters:
    """Adapters of a file, in evaluation mode; ValueError where it holds none."""
    from safetensors import SafetensorError, safe_open

    expected = "expected adapter.safetensors of `vlp data certainty`"
    try:
        with safe_open(str(path), framework="pt") as file:
            form = Form(**json.loads((file.metadata() or {})["form"]))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        adapters = Adapters(form)
        adapters.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} holds no adapters ({reason[:200]}); {expected}") from None
    return adapters.eval()
