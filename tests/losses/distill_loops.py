"""The forms of `distill` as loops over their equations, for test_family.py."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


def log_sum(values) -> Tensor:
    return torch.log(sum(torch.exp(value) for value in values))


def squared(a: Tensor, b: Tensor) -> Tensor:
    return ((a - b) ** 2).sum()


def sides(d: Inputs):
    """For images and texts: projections, the teacher's rows, those of the other modality, queue."""
    for own, other in (("image", "text"), ("text", "image")):
        rows = d[f"projected_{own}"]
        unit = rows / rows.norm(dim=1, keepdim=True)
        queue = [key for key in d[f"queue_teacher_{other}"].detach() if key.any()]
        yield unit, d[f"teacher_{own}"].detach(), d[f"teacher_{other}"].detach(), queue


def features(d: Inputs) -> Tensor:
    n = len(d["image"])
    total = 0
    for i in range(n):
        total = total + squared(d["projected_image"][i], d["teacher_image"][i].detach())
        total = total + squared(d["projected_text"][i], d["teacher_text"][i].detach())
    return total / n


def one_side(side: str, norm: str):
    def loop(d: Inputs) -> Tensor:
        n, total = len(d["image"]), 0
        for i in range(n):
            gap = d[f"projected_{side}"][i] - d[f"teacher_{side}"][i].detach()
            total = total + (gap.abs().sum() if norm == "l1" else (gap**2).sum())
        return total / n

    return loop


def interactive(queued: bool):
    def loop(d: Inputs) -> Tensor:
        n, total = len(d["image"]), 0
        for rows, _, columns, queue in sides(d):
            for i in range(n):
                candidates = [*columns, *queue] if queued else columns
                scores = [d["interactive_scale"] * (rows[i] @ column) for column in candidates]
                total = total + log_sum(scores) - scores[i]
        return total / (2 * n)

    return loop


def cross(d: Inputs) -> Tensor:
    n, total = len(d["image"]), 0
    for rows, teacher_rows, columns, _ in sides(d):
        for i in range(n):
            student = [d["interactive_scale"] * (rows[i] @ column) for column in columns]
            teacher = [d["teacher_scale"] * (teacher_rows[i] @ column) for column in columns]
            for j in range(n):
                log_p = teacher[j] - log_sum(teacher)
                log_q = student[j] - log_sum(student)
                total = total + torch.exp(log_p) * (log_p - log_q)
    return total / (2 * n)


def focused(power: float):
    """Cross-entropy to the teacher's similarities, weighted by what the student does not know."""

    def loop(d: Inputs) -> Tensor:
        z = d["scale"] * d["image"] @ d["text"].T
        teacher = d["teacher_scale"] * d["teacher_image"].detach() @ d["teacher_text"].detach().T
        total = 0
        for student, wanted in ((z, teacher), (z.T, teacher.T)):
            losses, weights = [], []
            for i in range(len(z)):
                log_q = student[i] - log_sum(student[i])
                p = torch.exp(wanted[i] - log_sum(wanted[i]))
                losses.append(-(p * log_q).sum())
                weights.append((1 - torch.exp(log_q[i])).detach() ** power)
            mean_weight = sum(weights) / len(weights)
            total = total + sum(w * loss for w, loss in zip(weights, losses)) / mean_weight
        return total / (2 * len(z))

    return loop


def list_mle(z: list[Tensor], scores: list[float]) -> Tensor:
    order = sorted(range(len(z)), key=lambda k: -scores[k])
    left = [z[k] for k in order]
    return sum((log_sum(left[r:]) - left[r] for r in range(len(left))), z[0] * 0)


def ranking(delta: float):
    """Of hard captions, up to the first that scores below score − δ."""

    def loop(d: Inputs) -> Tensor:
        total, n = 0, 0
        for i in range(len(d["image"])):
            scores = d["teacher_scores"][i].detach()
            live = [
                k
                for k in range(len(scores))
                if d["negatives_valid"][i, k] and scores[k] >= d["score"][i] - delta
            ]
            if live:
                z = [d["scale"] * (d["image"][i] @ d["negatives"][i, k]) for k in live]
                total, n = total + list_mle(z, [float(scores[k]) for k in live]), n + 1
        return total / n

    return loop


def candidates(delta: float, queued: bool = False):
    """Of the others of the batch, for images and for texts."""

    def loop(d: Inputs) -> Tensor:
        result = 0
        for own, other in (("image", "text"), ("text", "image")):
            columns = [*d[other], *d[f"queue_{other}"].detach()] if queued else d[other]
            total, n = 0, 0
            for i in range(len(d["image"])):
                scores = d[f"candidate_{other}_scores"][i].detach()
                places = d[f"candidate_{other}s"][i]
                live = [k for k, c in enumerate(scores) if c >= d["pair_score"][i] - delta]
                if live:
                    z = [d["scale"] * (d[own][i] @ columns[places[k]]) for k in live]
                    total, n = total + list_mle(z, [float(scores[k]) for k in live]), n + 1
            result = result + total / (2 * n)
        return result

    return loop


def margin(gamma: float):
    def loop(d: Inputs) -> Tensor:
        total, n = 0, 0
        for i in range(len(d["image"])):
            for k in range(d["negatives"].shape[1]):
                if d["negatives_valid"][i, k]:
                    gap = d["image"][i] @ d["text"][i] - d["image"][i] @ d["negatives"][i, k]
                    teacher_gap = d["score"][i] - d["teacher_scores"][i, k].detach()
                    total, n = total + (gap - gamma * teacher_gap) ** 2, n + 1
        return total / n

    return loop


BATCH = {"form": "ranking", "candidates": "batch"}
CASES = [
    ("distill", {"form": "features"}, features),
    (
        "distill",
        {"form": "features", "norm": "l1", "sides": "image"},
        one_side("image", "l1"),
    ),
    ("distill", {"form": "features", "sides": "text"}, one_side("text", "squared")),
    ("distill", {"form": "interactive"}, interactive(False)),
    ("distill", {"form": "interactive", "queue": True}, interactive(True)),
    ("distill", {"form": "cross"}, cross),
    ("distill", {"focus": 1.5}, focused(1.5)),
    ("distill", {"form": "ranking", "delta": 0.9}, ranking(0.9)),
    ("distill", {"form": "margin", "gamma": 0.3}, margin(0.3)),
    ("distill", BATCH | {"delta": 0.3}, candidates(0.3)),
]
