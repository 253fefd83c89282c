"""Linear classifiers on embeddings: the exact optimum by L-BFGS, and clip_benchmark's by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

# --- the optimum ----------------------------------------------------------------------------------


def logistic_regression(
    features: Tensor,  # [n, D]
    labels: Tensor,  # [n] int64 in [0, C)
    n_classes: int,
    decay: float,  # λ of λ/2‖W‖² beside the mean cross-entropy
    max_iterations: int = 500,
) -> tuple[Tensor, Tensor]:  # [C, D], [C] float64
    """The minimiser (W, b) of mean cross-entropy + λ/2‖W‖², by L-BFGS in float64 from zero; b is
    not decayed.
    """
    features = features.double()
    weight = torch.zeros(n_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        logits = features @ weight.T + bias
        penalty = decay / 2 * weight.square().sum()
        loss = torch.nn.functional.cross_entropy(logits, labels) + penalty
        loss.backward()
        return loss

    # Evaluation runs without gradients; the probe needs its own.
    with torch.enable_grad():
        optimiser.step(closure)
    return weight.detach(), bias.detach()


# --- clip_benchmark's -----------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamW:
    """How clip_benchmark fits its probe; the defaults are its own."""

    epochs: int = 10
    learning_rate: float = 0.1  # at the start of a half cosine down to zero
    batch: int = 64  # rows a step
    seed: int = 0  # of the start and of the order of rows


def adamw_probe(
    features: Tensor,  # [n, D] float32
    labels: Tensor,  # [n] int64 in [0, C)
    n_classes: int,
    decay: float,  # AdamW's weight decay, of weights and biases
    settings: AdamW,
) -> tuple[Tensor, Tensor]:  # [C, D], [C] float32
    """A linear layer after some epochs of AdamW; the same numbers as clip_benchmark's `train`.

    Source: LAION-AI/CLIP_benchmark@48de38c, `clip_benchmark/metrics/linear_probe.py`.
    """
    # The same draws in the same order: the layer's start, then each epoch's order of rows, which
    # DataLoader takes from the global state. It deals row numbers: rows one by one take long.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(settings.seed)
        layer = torch.nn.Linear(features.shape[1], n_classes)
        batches = DataLoader(range(len(features)), settings.batch, shuffle=True)  # type: ignore[arg-type, var-annotated]
        optimiser = torch.optim.AdamW(
            layer.parameters(), lr=settings.learning_rate, weight_decay=decay
        )

        n_steps, step = settings.epochs * len(batches), 0
        for _ in range(settings.epochs):
            for rows in batches:
                share_left = 0.5 * (1 + math.cos(math.pi * step / n_steps))
                optimiser.param_groups[0]["lr"] = share_left * settings.learning_rate
                step += 1

                optimiser.zero_grad()
                loss = torch.nn.functional.cross_entropy(layer(features[rows]), labels[rows])
                loss.backward()
                optimiser.step()
    return layer.weight.detach(), layer.bias.detach()


def swept_decay(accuracy: Callable[[float], float]) -> float:
    """The weight decay that clip_benchmark's search chooses by validation accuracy.

    97 decays from 1e-6 to 1e2: first every 16th, then the best so far against those 8, 4, 2 and 1
    places beside it. Of equals the first that is tried wins.
    """
    decays = np.logspace(-6, 2, num=97)
    measured: dict[int, float] = {}

    def best_of(places: list[int]) -> int:
        for place in places:
            if place not in measured:
                measured[place] = accuracy(float(decays[place]))
        # Nothing is better than an accuracy of zero: the first decay of all stands then.
        winner = max(places, key=measured.__getitem__)
        return winner if measured[winner] > 0 else 0

    best = best_of(list(range(0, len(decays), 16)))
    for span in (8, 4, 2, 1):
        best = best_of([max(best - span, 0), best, min(best + span, len(decays) - 1)])
    return float(decays[best])


def ranks(
    rows: Tensor,  # [n, D]
    labels: Tensor,  # [n] int64
    weight: Tensor,  # [C, D]
    bias: Tensor,  # [C]
) -> Tensor:  # [n] int64
    """Rank of the right class among the logits; of equal ones the class listed first wins."""
    logits = rows @ weight.T + bias
    right = logits.gather(1, labels[:, None])
    listed_before = torch.arange(len(weight)) < labels[:, None]
    return 1 + ((logits > right) | (listed_before & (logits == right))).sum(1)
