"""Objectives over several views of a sample as loops over their equations, for test_family.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.losses.family_data import CANDIDATES, B, D
from tests.losses.one_file_loops import Inputs, Loop, log_sum, others

FIELDS = {
    "all": ("image_views", "text_views"),
    "image": ("image_views",),
    "text": ("text_views",),
    "augmented": ("image_views", "text_views"),
}


def views_of(d: Inputs, views: str) -> list[Tensor]:
    pair = [d["image"], d["text"]] if views == "all" else []
    return pair + [view for name in FIELDS[views] for view in d.get(name, ())]


def mv_infonce(views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        kinds = list(itertools.permutations(range(len(u)), 2))
        for i in CANDIDATES:
            numerator = [d["scale"] * (u[a][i] @ u[b][i]) for a, b in kinds]
            negatives = [
                d["scale"] * (u[a][i] @ u[b][j]) for a, b in kinds for j in others(i, labels)
            ]
            total = total + log_sum(numerator + negatives) - log_sum(numerator)
        return total / B

    return loop


def mv_dhel(views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        for i in CANDIDATES:
            for view in u:
                negatives = [d["scale"] * (view[i] @ view[j]) for j in others(i, labels)]
                total = total + (log_sum(negatives) if negatives else 0)
            numerator = [
                d["scale"] * (u[a][i] @ u[b][i])
                for a, b in itertools.permutations(range(len(u)), 2)
            ]
            total = total - log_sum(numerator)
        return total / B

    return loop


def poly_view(form: str, views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        for i in CANDIDATES:
            for a in range(len(u)):
                negatives = [
                    torch.exp(d["scale"] * (u[a][i] @ view[j]))
                    for view in u
                    for j in others(i, labels)
                ]
                shares = []
                for b in range(len(u)):
                    if b != a:
                        own = torch.exp(d["scale"] * (u[a][i] @ u[b][i]))
                        shares.append(own / (own + sum(negatives)))
                if form == "geometric":
                    value = -sum(torch.log(share) for share in shares) / len(shares)
                else:
                    value = -torch.log(sum(shares) / len(shares))
                total = total + value / len(u)
        return total / B

    return loop


def barlow(off_diagonal: float, views: bool) -> Loop:
    def standardised(rows: Tensor) -> Tensor:
        return (rows - rows.mean(0)) / rows.std(0, correction=0)

    def loop(d: Inputs) -> Tensor:
        compared = [(d["image"], d["text"])]
        if views:
            compared += itertools.product(d["image_views"], d["text_views"])

        total = 0
        for image, text in compared:
            x, t = standardised(image), standardised(text)
            for e in range(D):
                for f in range(D):
                    c = sum(x[i, e] * t[i, f] for i in CANDIDATES) / B
                    total = total + ((1 - c) ** 2 if e == f else off_diagonal * c**2)
        return total / len(compared)

    return loop


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments whose rows sum to 1, by plain division."""
    q = torch.exp(scores / epsilon)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / len(q)
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


def swap(epsilon: float, iterations: int) -> Loop:
    def loop(d: Inputs) -> Tensor:
        total = 0
        for a, c in itertools.product(range(2), range(2)):
            scores = d["view_scale"] * d["image_views"][a] @ d["text_views"][c].T
            target = (d["image_views"][1 - a] @ d["text_views"][1 - c].T).detach()
            for z, s in ((scores, target), (scores.T, target.T)):
                q = sinkhorn(s, epsilon, iterations)
                for i in CANDIDATES:
                    norm = log_sum(list(z[i]))
                    total = total - sum(q[i, j] * (z[i, j] - norm) for j in CANDIDATES) / (8 * B)
        return total

    return loop


def siam(target: str) -> Loop:
    prefix = {"model": "", "ema": "ema_"}[target]

    def loop(d: Inputs) -> Tensor:
        total = 0
        for side in ("image", "text"):
            for i in CANDIDATES:
                gap = d[f"predicted_{side}"][i] - d[f"{prefix}{side}"][i].detach()
                total = total + (gap**2).sum() / (2 * B)
        return total

    return loop


CASES = [
    ("siam", {}, siam("model")),
    ("siam", {"target": "ema"}, siam("ema")),
    ("mv_infonce", {}, mv_infonce()),
    ("mv_infonce", {"views": "augmented"}, mv_infonce("augmented")),
    ("mv_dhel", {}, mv_dhel()),
    ("mv_dhel", {"views": "text"}, mv_dhel("text")),
    ("poly_view", {}, poly_view("geometric")),
    ("poly_view", {"form": "arithmetic"}, poly_view("arithmetic")),
    ("poly_view", {"views": "image"}, poly_view("geometric", "image")),
    ("barlow", {}, barlow(5e-3, False)),
    ("barlow", {"off_diagonal": 0.3, "views": True}, barlow(0.3, True)),
    ("swap", {}, swap(0.05, 3)),
    ("swap", {"epsilon": 0.4, "iterations": 1}, swap(0.4, 1)),
]
