"""Objectives of a file each as loops over their equations, for test_family.py."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.losses.family_data import CANDIDATES, B

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
                negatives = [square(left[i], right[j]) for j in others(i, labels)]
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


CASES = [
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
