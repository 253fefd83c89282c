"""The term `captions` as loops from its equations, for the test of the whole family; captions that
are not valid are left out by `if`, not by a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = {"long": 1.0, "short": 0.25, "raw": 2.0}


def log_sum(scores) -> Tensor:
    return torch.log(sum(torch.exp(score) for score in scores))


def samples_of(d, k: int) -> list[int]:
    """The samples that have a caption in column k."""
    return [i for i in range(len(d["image"])) if d["captions_valid"][i, k]]


def column(d, k: int, image: Tensor, smoothing: float) -> Tensor:
    """L_CLIP over the samples of one column."""
    samples = samples_of(d, k)
    total = 0
    for i in samples:
        rows = [d["scale"] * (image[i] @ d["captions"][j, k]) for j in samples]
        columns = [d["scale"] * (image[j] @ d["captions"][i, k]) for j in samples]
        for scores in (rows, columns):
            target = [smoothing / len(samples)] * len(samples)
            target[samples.index(i)] += 1 - smoothing
            norm = log_sum(scores)
            total = total - sum(y * (score - norm) for y, score in zip(target, scores)) / 2
    return total / len(samples)


def principal(d, k: int, components: int, renormalise: bool) -> Tensor:
    """The images projected on the components of those in the column, by a plain SVD."""
    of_column = d["image"].detach()[samples_of(d, k)]
    mean = of_column.mean(0)
    _, _, basis = torch.linalg.svd(of_column - mean)
    kept = basis[:components]
    projected = (d["image"] - mean) @ kept.T @ kept + mean
    return projected / projected.norm(dim=1, keepdim=True) if renormalise else projected


def mean_form(weights=(1.0, 1.0, 1.0), smoothing=0.0, short=None):
    def loop(d):
        total, total_weight = 0, 0
        for k, weight in enumerate(weights):
            if len(samples_of(d, k)) < 2:
                continue
            image = d["image"]
            if short is not None and k == short["column"]:
                image = principal(d, k, short["components"], short["renormalise"])
            total = total + weight * column(d, k, image, smoothing)
            total_weight += weight
        return total / total_weight

    return loop


def decoupled_form(weights=(1.0, 1.0, 1.0)):
    def loop(d):
        cells = [(i, k) for k in range(len(weights)) for i in samples_of(d, k)]
        samples = sorted({i for i, _ in cells})
        total = 0
        for i in samples:
            own = [k for j, k in cells if j == i]
            of_sample = 0
            for k in own:
                positive = d["scale"] * (d["image"][i] @ d["captions"][i, k])
                texts = [d["image"][i] @ d["captions"][j, m] for j, m in cells if j != i]
                images = [d["image"][j] @ d["captions"][i, k] for j in samples if j != i]
                for others in (texts, images):
                    scores = [positive, *(d["scale"] * score for score in others)]
                    of_sample = of_sample + weights[k] * (log_sum(scores) - positive)
            total = total + of_sample / sum(weights[k] for k in own) / 2
        return total / len(samples)

    return loop


SHORT = {"components": 2, "column": 1, "renormalise": False}
CASES = [
    ("captions", {}, mean_form()),
    (
        "captions",
        {"weights": WEIGHTS, "label_smoothing": 0.1},
        mean_form(tuple(WEIGHTS.values()), 0.1),
    ),
    (
        "captions",
        {"label_smoothing": 0.1, "short": SHORT},
        mean_form(smoothing=0.1, short=SHORT),
    ),
    (
        "captions",
        {"short": SHORT | {"renormalise": True}},
        mean_form(short=SHORT | {"renormalise": True}),
    ),
    ("captions", {"form": "decoupled"}, decoupled_form()),
    (
        "captions",
        {"form": "decoupled", "weights": WEIGHTS},
        decoupled_form(tuple(WEIGHTS.values())),
    ),
]
