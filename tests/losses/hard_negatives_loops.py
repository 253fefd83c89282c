"""The forms of `hard_negatives` as loops over their equations, for test_family.py."""

from __future__ import annotations

from itertools import product

import torch

from tests.losses.family_data import CANDIDATES, B, J, K
from tests.losses.family_loops import log_sum, z


def captions(d, columns=range(K)):
    return [d["negatives"][j, k] for j in CANDIDATES for k in columns if d["negatives_valid"][j, k]]


def negclip(d, columns=range(K)):
    total = 0
    for i in CANDIDATES:
        hard = [d["scale"] * (d["image"][i] @ n) for n in captions(d, columns)]
        total = total + log_sum([*(z(d, i, j) for j in CANDIDATES), *hard]) - z(d, i, i)
        total = total + log_sum(z(d, j, i) for j in CANDIDATES) - z(d, i, i)
    return total / (2 * B)


def negclip_of_images(d):
    """The direction of images alone."""
    total = 0
    for i in CANDIDATES:
        hard = [d["scale"] * (d["image"][i] @ n) for n in captions(d)]
        total = total + log_sum([*(z(d, i, j) for j in CANDIDATES), *hard]) - z(d, i, i)
    return total / B


def triplet(d):
    second, n, scale = 0, 0, d["scale"]
    both_valid = d["negatives_valid"][:, 0] & d["negative_images_valid"][:, 0]
    live = [j for j in CANDIDATES if both_valid[j]]

    for i in live:
        x, caption = d["negative_images"][:, 0], d["negatives"][:, 0]
        own = scale * (x[i] @ caption[i])
        rows = [scale * (x[i] @ c) for c in [*(caption[j] for j in live), *d["text"]]]
        second = (
            second
            + (log_sum(rows) + log_sum(scale * (x[j] @ caption[i]) for j in live) - 2 * own) / 2
        )
        n += 1

    return negclip(d, columns=[0]) + second / n


def own(gamma, smoothing):
    def loop(d):
        total, n = 0, 0
        for i in CANDIDATES:
            hard = [d["negatives"][i, k] for k in range(K) if d["negatives_valid"][i, k]]
            if not hard:
                continue
            scores = [d["scale"] * (d["image"][i] @ t) for t in (d["text"][i], *hard)]
            for k, score in enumerate(scores):
                log_p = score - log_sum(scores)
                y = (1 - smoothing) * (k == 0) + smoothing / (1 + len(hard))
                total = total - y * (1 - torch.exp(log_p)) ** gamma * log_p
            n += 1

        return total / n

    return loop


def text_grounded(d):
    total, n = 0, 0
    for i in CANDIDATES:
        hard = [d["negatives"][i, k] for k in range(K) if d["negatives_valid"][i, k]]
        if hard:
            scores = [10 * (d["text"][i] @ t) for t in (d["ema_text"][i].detach(), *hard)]
            total, n = total + log_sum(scores) - scores[0], n + 1
    return total / n


def rank(margin):
    def loop(d):
        cells = [(i, k) for i in CANDIDATES for k in range(K) if d["negatives_valid"][i, k]]
        gap = [
            margin[k] + d["scale"] * (d["image"][i] @ d["negatives"][i, k]) - z(d, i, i)
            for i, k in cells
        ]
        return sum(torch.clamp(g, min=0) for g in gap) / len(cells)

    return loop


def intra(d):
    total = 0
    for i in CANDIDATES:
        hard = [d["scale"] * (d["text"][i] @ n) for n in captions(d)]
        total = total + log_sum([z(d, i, i), *hard]) - z(d, i, i)
    return total / B


def sigmoid(d):
    total, n = 0, 0
    for i in CANDIDATES:
        hard = [d["negatives"][i, k] for k in range(K) if d["negatives_valid"][i, k]]
        if hard:
            scores = [d["scale"] * (d["image"][i] @ t) + d["bias"] for t in hard]
            positive = z(d, i, i) + d["bias"]
            total = total - torch.log(torch.sigmoid(positive))
            total = total - sum(torch.log(torch.sigmoid(-score)) for score in scores)
            n += 1
    return total / n


def mmclip_images(d):
    """For caption t_i: −log σ(scale·s_ii + b) − Σ_j log σ(−(scale·t_i·x⁻_ij + b))."""
    total, n = 0, 0
    for i in CANDIDATES:
        live = [j for j in range(J) if d["negative_images_valid"][i, j]]
        if live:
            x = d["negative_images"][i]
            scores = [d["scale"] * (d["text"][i] @ x[j]) + d["bias"] for j in live]
            total = total - torch.log(torch.sigmoid(z(d, i, i) + d["bias"]))
            total = total - sum(torch.log(torch.sigmoid(-score)) for score in scores)
            n += 1
    return total / n


def own_images(d):
    """The softmax of t_i over its image and its own hard images."""
    total, n = 0, 0
    for i in CANDIDATES:
        live = [j for j in range(J) if d["negative_images_valid"][i, j]]
        if live:
            hard = [d["scale"] * (d["text"][i] @ d["negative_images"][i, j]) for j in live]
            total, n = total + log_sum([z(d, i, i), *hard]) - z(d, i, i), n + 1
    return total / n


def negclip_images(d):
    """A caption has every hard image of the candidates beside their images."""
    total = 0
    hard_images = [
        d["negative_images"][i, j]
        for i, j in product(CANDIDATES, range(J))
        if d["negative_images_valid"][i, j]
    ]
    for i in CANDIDATES:
        hard = [d["scale"] * (d["text"][i] @ x) for x in hard_images]
        total = total + log_sum([*(z(d, j, i) for j in CANDIDATES), *hard]) - z(d, i, i)
        total = total + log_sum(z(d, i, j) for j in CANDIDATES) - z(d, i, i)
    return total / (2 * B)
