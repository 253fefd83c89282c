"""Objectives of a file each as loops over their equations, for test_family.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.family_data import CANDIDATES, B, D
from tests.losses.family_loops import keys
from vlp.losses._draws import beta, draws
from vlp.seeds import derive

Inputs = dict[str, Tensor]
Loop = Callable[[Inputs], Tensor]


def log_sum(values: list[Tensor]) -> Tensor:
    return torch.log(sum(torch.exp(value) for value in values))


def others(i: int, labels: Tensor | None = None) -> list[int]:
    """The other samples; with labels only those of another one."""
    rest = [j for j in CANDIDATES if j != i]
    return rest if labels is None else [j for j in rest if labels[j] != labels[i]]


def square(a: Tensor, b: Tensor) -> Tensor:
    """‖a − b‖² of unit rows."""
    return 2 - 2 * (a @ b)


def directions(d: Inputs) -> list[tuple[Tensor, Tensor]]:
    return [(d["image"], d["text"]), (d["text"], d["image"])]


def koleo(epsilon: float) -> Loop:
    def loop(d: Inputs) -> Tensor:
        total = 0
        for rows in (d["image"], d["text"]):
            for i in CANDIDATES:
                distances = [(rows[i] - rows[j]).norm() for j in others(i)]
                total = total - torch.log(min(distances) + epsilon) / (2 * B)
        return total

    return loop


def decoupled_uniformity(t: float, kernel: str, ridge: float) -> Loop:
    def loop(d: Inputs) -> Tensor:
        centres = (d["image"] + d["text"]) / 2
        if kernel != "none":
            rows = d[f"teacher_{kernel}"].detach()
            alike = torch.stack([rows @ row for row in rows])
            centres = (
                torch.linalg.inv(alike + ridge * torch.eye(B, dtype=torch.float64))
                @ alike
                @ centres
            )

        exponents = [
            -t * ((centres[i] - centres[j]) ** 2).sum() for i in CANDIDATES for j in range(i + 1, B)
        ]
        return log_sum(exponents) - math.log(len(exponents))

    return loop


def cacr(
    alpha: float = 1,
    beta: float = 1,
    attract: float = 1,
    repel: float = 1,
    captions: bool = False,
    labels: Tensor | None = None,
) -> Loop:
    def weighted(squares: list[Tensor], scale: float) -> Tensor:
        weights = [torch.exp(scale * value) for value in squares]
        return sum(w * value for w, value in zip(weights, squares)) / sum(weights)

    def loop(d: Inputs) -> Tensor:
        total = 0
        for side, (left, right) in enumerate(directions(d)):
            for i in CANDIDATES:
                positives = [right[i]]
                if captions and side == 0:
                    valid = d["captions_valid"][i]
                    positives = [d["captions"][i, k] for k in range(len(valid)) if valid[k]]
                if positives:
                    squares = [((left[i] - p) ** 2).sum() for p in positives]
                    total = total + alpha * weighted(squares, attract)
                negatives = [((left[i] - right[j]) ** 2).sum() for j in others(i, labels)]
                total = total - beta * weighted(negatives, -repel)
        return total / (2 * B)

    return loop


def kernel_mixture(mix: float, labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        total = 0
        for gamma, weight in ((1, mix), (2, 1 - mix)):
            for left, right in directions(d):
                for i in CANDIDATES:
                    z = [
                        -d["scale"] * (square(left[i], right[j]) + 1e-12) ** (gamma / 2)
                        for j in [i, *others(i, labels)]
                    ]
                    total = total + weight * (log_sum(z) - z[0]) / (2 * B)
        return total

    return loop


def mixup(temperature: float, alpha: float, share: float) -> Loop:
    def loop(d: Inputs) -> Tensor:
        total = 0
        for name, (left, right) in zip(("image", "text"), directions(d)):
            seed = derive(0, "mixup", name, 0)
            chosen, of_beta, order = (u[:, 0] for u in draws(torch.arange(B), seed, 1))
            partner = order.argsort().tolist()

            mixtures, target = [], torch.zeros(B, B, dtype=torch.float64)
            for i in CANDIDATES:
                w = beta(of_beta[i], alpha) if chosen[i] < share else torch.tensor(1.0)
                mixture = w * left[i] + (1 - w) * left[partner[i]]
                mixtures.append(mixture / mixture.norm() if w < 1 else left[i])
                target[i, i] += w
                target[i, partner[i]] += 1 - w

            z = torch.stack(mixtures) @ right.T / temperature
            for i in CANDIDATES:
                for j in CANDIDATES:
                    log_p = (z[i, j] - log_sum(list(z[i]))) + (z[i, j] - log_sum(list(z[:, j])))
                    total = total - target[i, j] * log_p / (4 * B)
        return total

    return loop


def soft_mixup(temperature: float) -> Loop:
    """What follows the mixing: each modality's own similarities are the target of both."""

    def loop(d: Inputs) -> Tensor:
        total, z = 0, d["image"] @ d["text"].T / temperature
        for rows in (d["image"].detach(), d["text"].detach()):
            target = (rows @ rows.T / temperature).softmax(1)
            for scores in (z, z.T):
                total = total - (target * scores.log_softmax(1)).sum() / (4 * B)
        return total

    return loop


def transformed(options: dict) -> Loop:
    """A queue's loss whose pair is extrapolated and whose keys are interpolated."""

    def key(queue: list[Tensor], name: str) -> list[Tensor]:
        seed = derive(0, "interpolated queue", name, 0)
        uniform, order, _ = draws(torch.arange(len(queue)), seed, D)
        places, factors = order[:, 0].argsort().tolist(), beta(uniform, options["interpolate"])
        return [
            F.normalize(factors[q] * queue[q] + (1 - factors[q]) * queue[places[q]], dim=0)
            for q in range(len(queue))
        ]

    def loop(d: Inputs) -> Tensor:
        uniform, *_ = draws(torch.arange(B), derive(0, "extrapolation", 0), D)
        m, total = 1 + beta(uniform, options["extrapolate"]), 0
        for name, (left, right) in zip(("text", "image"), directions(d)):
            queue = key(keys(d[f"queue_{name}"]), name)
            for i in CANDIDATES:
                x = F.normalize(m[i] * left[i] + (1 - m[i]) * right[i], dim=0)
                t = F.normalize(m[i] * right[i] + (1 - m[i]) * left[i], dim=0)
                pair = d["scale"] * (x @ t)
                others = [d["scale"] * (left[i] @ k) for k in queue]
                total = total + log_sum([pair, *others]) - pair
        return total / (2 * B)

    return loop


TRANSFORMED = {"extrapolate": 2, "interpolate": 1.6}
QUEUE_ALONE = {"mixed_pairs": 0, "mixed_queries": 0, "in_batch": False}
CASES = [
    ("mixup", {}, mixup(0.1, 0.15, 0.5)),
    ("mixup", {"alpha": 2, "share": 1, "temperature": 0.5}, mixup(0.5, 2, 1)),
    ("mixup", {"until_step": 0}, soft_mixup(0.125)),
    ("mixing", QUEUE_ALONE | TRANSFORMED, transformed(TRANSFORMED)),
    ("koleo", {}, koleo(1e-8)),
    ("koleo", {"epsilon": 0.1}, koleo(0.1)),
    ("decoupled_uniformity", {}, decoupled_uniformity(2, "none", 0)),
    ("decoupled_uniformity", {"t": 0.7}, decoupled_uniformity(0.7, "none", 0)),
    ("cacr", {}, cacr()),
    (
        "cacr",
        {"alpha": 0.5, "beta": 2, "positive_scale": 1.5, "negative_scale": 0.9, "captions": True},
        cacr(0.5, 2, 1.5, 0.9, True),
    ),
    ("kernel_mixture", {}, kernel_mixture(0.5)),
    ("kernel_mixture", {"mix": 1}, kernel_mixture(1)),
    ("kernel_mixture", {"mix": 0}, kernel_mixture(0)),
]
