"""Objectives over several views of a sample as loops over their equations, for test_family.py."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tests.losses.family_data import CANDIDATES, B, D
from tests.losses.one_file_loops import Inputs, Loop, others

FIELDS = {
    "all": ("image_views", "text_views"),
    "image": ("image_views",),
    "text": ("text_views",),
    "augmented": ("image_views", "text_views"),
}


def views_of(d: Inputs, views: str) -> list[Tensor]:
    pair = [d["image"], d["text"]] if views == "all" else []
    return pair + [view for name in FIELDS[views] for view in d.get(name, ())]


def scores_of(d: Inputs, u: list[Tensor]) -> dict[tuple[int, int], Tensor]:
    """z of all samples for each two kinds of view, [B, B]."""
    kinds = itertools.product(range(len(u)), repeat=2)
    return {(a, b): d["scale"] * (u[a] @ u[b].T) for a, b in kinds}


def mv_infonce(views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        z, kinds = scores_of(d, u), list(itertools.permutations(range(len(u)), 2))
        for i in CANDIDATES:
            numerator = torch.stack([z[kind][i, i] for kind in kinds])
            negatives = torch.cat([z[kind][i, others(i, labels)] for kind in kinds])
            total = total + torch.cat([numerator, negatives]).logsumexp(0) - numerator.logsumexp(0)
        return total / B

    return loop


def mv_dhel(views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        z, kinds = scores_of(d, u), list(itertools.permutations(range(len(u)), 2))
        for i in CANDIDATES:
            for a in range(len(u)):
                negatives = z[a, a][i, others(i, labels)]
                total = total + (negatives.logsumexp(0) if len(negatives) else 0)
            total = total - torch.stack([z[kind][i, i] for kind in kinds]).logsumexp(0)
        return total / B

    return loop


def poly_view(form: str, views: str = "all", labels: Tensor | None = None) -> Loop:
    def loop(d: Inputs) -> Tensor:
        u, total = views_of(d, views), 0
        z, kinds = scores_of(d, u), range(len(u))
        for i in CANDIDATES:
            for a in kinds:
                negatives = sum(torch.exp(z[a, b][i, others(i, labels)]).sum() for b in kinds)
                own = torch.stack([torch.exp(z[a, b][i, i]) for b in kinds if b != a])
                shares = own / (own + negatives)
                value = -torch.log(shares).mean()
                if form == "arithmetic":
                    value = -torch.log(shares.mean())
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
                    c = (x[:, e] * t[:, f]).sum() / B
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
                    total = total - (q[i] * (z[i] - z[i].logsumexp(0))).sum() / (8 * B)
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
