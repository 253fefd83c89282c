"""Objectives over a batch's own pairs, queues and views as loops over their equations, for
test_family.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses.family_data import CANDIDATES, CONCEPTS, B, K, L, V
from vlp.losses._draws import draws
from vlp.losses._von_mises_fisher import samples
from vlp.seeds import derive


def log_sum(values) -> Tensor:
    return torch.log(sum(torch.exp(v) for v in values))


def z(d, i, j) -> Tensor:
    return d["scale"] * (d["image"][i] @ d["text"][j])


def others(i):
    return [j for j in CANDIDATES if j != i]


def both(one):
    """Mean over rows of ½ (row term + column term); one(score, i) with score(j, k) the score that
    row j gives k.
    """

    def loop(d):
        rows = sum(one(lambda i, j: z(d, i, j), i, d) for i in CANDIDATES)
        columns = sum(one(lambda i, j: z(d, j, i), i, d) for i in CANDIDATES)
        return (rows + columns) / (2 * B)

    return loop


def infonce(score, i, d):
    return log_sum(score(i, j) for j in CANDIDATES) - score(i, i)


def siglip(d):
    y = 2 * torch.eye(B) - 1
    return (
        sum(
            torch.log(1 + torch.exp(-y[i, j] * (z(d, i, j) + d["bias"])))
            for i in CANDIDATES
            for j in CANDIDATES
        )
        / B
    )


def distance(a, b):
    return ((a - b) ** 2).sum()


def uniformity(d):
    total = 0
    for name in ("image", "text"):
        e = d[name]
        cells = [4 * (e[i] @ e[j]) - 4 for i in CANDIDATES for j in range(i + 1, B)]
        total = total + 0.5 * (log_sum(cells) - math.log(len(cells)))
    return total


def cross_uniformity(d):
    cells = [4 * (d["image"][i] @ d["text"][j]) - 4 for i in CANDIDATES for j in others(i)]
    return log_sum(cells) - math.log(len(cells))


def alignment(d):
    return sum(distance(d["image"][i], d["text"][i]) for i in CANDIDATES) / B


def decoupled(score, i, d):
    return log_sum(score(i, j) for j in others(i)) - score(i, i)


def decoupled_weighted(score, i, d):
    own = [torch.exp((d["image"][k] @ d["text"][k]).detach() / 0.5) for k in CANDIDATES]
    weight = 2 - B * own[i] / sum(own)
    return log_sum(score(i, j) for j in others(i)) - weight * score(i, i)


def hn_nce(alpha, beta):
    def one(score, i, d):
        norm = sum(torch.exp(beta * score(i, k)) for k in others(i))
        hard = sum(
            (B - 1) * torch.exp(beta * score(i, j)) / norm * torch.exp(score(i, j))
            for j in others(i)
        )
        return -torch.log(torch.exp(score(i, i)) / (alpha * torch.exp(score(i, i)) + hard))

    return one


def counting(scaled, n_wrong):
    def loop(d):
        total, n = 0, 0
        for i in CANDIDATES:
            if d["counterfactual_valid"][i]:
                g = [d["image"][i] @ t for t in (d["text"][i], *d["counterfactual"][i][:n_wrong])]
                g = [d["scale"] * v for v in g] if scaled else g
                total, n = total - torch.log(torch.exp(g[0]) / sum(torch.exp(v) for v in g)), n + 1
        return total / n

    return loop


def macl(d):
    mean = sum((d["image"][i] @ d["text"][i]).detach() for i in CANDIDATES) / B
    temperature = 0.1 * (1 + 0.5 * mean)
    cosine = d["image"] @ d["text"].T / temperature

    total = 0
    for score in (cosine, cosine.T):
        for i in CANDIDATES:
            log_p = score[i, i] - log_sum(score[i])
            total = total - log_p / (1 - torch.exp(log_p.detach())) / (2 * B)
    return total


def cyclip(d):
    x, t = d["image"], d["text"]
    return sum(
        (x[i] @ x[j] - t[i] @ t[j]) ** 2 + (x[i] @ t[j] - x[j] @ t[i]) ** 2
        for i in CANDIDATES
        for j in CANDIDATES
    ) / (4 * B)


def cwcl(frozen, sharpening):
    def loop(d):
        total, u = 0, d[frozen].detach()
        score = (lambda i, j: z(d, i, j)) if frozen == "image" else (lambda i, j: z(d, j, i))

        for i in CANDIDATES:
            w = [(0.5 + 0.5 * u[i] @ u[j]) ** sharpening for j in CANDIDATES]
            norm = log_sum(score(i, j) for j in CANDIDATES)
            total = total - sum(w[j] * (score(i, j) - norm) for j in CANDIDATES) / sum(w) / (2 * B)
            total = total - (score(i, i) - log_sum(score(j, i) for j in CANDIDATES)) / (2 * B)
        return total

    return loop


def distill(d):
    teacher = d["teacher_scale"] * d["teacher_image"].detach() @ d["teacher_text"].detach().T
    student = d["scale"] * d["image"] @ d["text"].T

    total = 0
    for t, s in ((teacher, student), (teacher.T, student.T)):
        for i in CANDIDATES:
            p = torch.exp(t[i]) / torch.exp(t[i]).sum()
            total = total - sum(p[j] * (s[i, j] - log_sum(s[i])) for j in CANDIDATES) / (2 * B)
    return total


def self_distillation(negatives):
    def loop(d):
        total = 0
        for i in CANDIDATES:
            total = total + distance(d["image"][i], d["ema_image"][i].detach())
            total = total + distance(d["text"][i], d["ema_text"][i].detach())
            for k in range(K) if negatives else ():
                if d["negatives_valid"][i, k]:
                    total = total + distance(
                        d["negatives"][i, k], d["ema_negatives"][i, k].detach()
                    )

        return total / B

    return loop


def ranking(d):
    total, n = 0, 0
    for i in CANDIDATES:
        live = [k for k in range(K) if d["negatives_valid"][i, k]]
        left = [
            d["scale"] * (d["image"][i] @ d["negatives"][i, k])
            for k in sorted(live, key=lambda k: -d["teacher_scores"][i, k])
        ]
        total, n = (
            total + sum(log_sum(left[r:]) - left[r] for r in range(len(left))),
            n + bool(left),
        )

    return total / n


def concepts(d):
    total, n = 0, 0
    for i in CANDIDATES:
        q, z = d["concept_targets"][i], d["concept_logits"][i]
        if q.sum() > 0:
            total, n = (
                total - sum(q[c] / q.sum() * (z[c] - log_sum(z)) for c in range(CONCEPTS)),
                n + 1,
            )

    return total / n


def captioning(d):
    cells = [(i, k) for i in CANDIDATES for k in range(L) if d["caption_ids"][i, k]]
    z = d["caption_logits"]
    return sum(log_sum(z[i, k]) - z[i, k, d["caption_ids"][i, k]] for i, k in cells) / len(cells)


def ranked(power, normalize):
    def loop(d):
        w = [float(s) ** power for s in d["score"]]
        total = sum(
            w[i] * (infonce(lambda i, j: z(d, i, j), i, d) + infonce(lambda i, j: z(d, j, i), i, d))
            for i in CANDIDATES
        )
        return total / 2 / (sum(w) if normalize else B)

    return loop


def mann_whitney(tau):
    def loop(d):
        s = d["image"] @ d["text"].T
        cells = [(i, k, j) for i in CANDIDATES for k in CANDIDATES for j in others(k)]
        return sum(torch.log(1 + torch.exp((s[k, j] - s[i, i]) / tau)) for i, k, j in cells) / len(
            cells
        )

    return loop


def keys(queue):
    return [row for row in queue.detach() if row.any()]


def momentum_queue(d):
    total = 0
    for own, other in (("image", "text"), ("text", "image")):
        for i in CANDIDATES:
            positive = d[own][i] @ d[f"ema_{other}"][i].detach() / 0.07
            total = (
                total
                + log_sum([positive, *(d[own][i] @ k / 0.07 for k in keys(d[f"queue_{other}"]))])
                - positive
            )

    return total / (2 * B)


def mixtures(query, queue, i, name, options):
    """One by one, with the numbers that row i draws."""
    hardest = sorted(keys(queue), key=lambda k: -(query @ k))[: options["hardest"]]
    n, n_pairs = len(hardest), options["mixed_pairs"]
    seed = derive(0, "mixing", name, 0)
    which, other, weight = (
        u[0].tolist() for u in draws(torch.tensor([i]), seed, n_pairs + options["mixed_queries"])
    )

    for m in range(len(which)):
        first = int(which[m] * n)
        second = (first + 1 + int(other[m] * (n - 1))) % n
        assert first != second
        if m < n_pairs:
            mixed = weight[m] * hardest[first] + (1 - weight[m]) * hardest[second]
        else:
            mixed = weight[m] / 2 * query + (1 - weight[m] / 2) * hardest[first]
        yield mixed.detach() / mixed.detach().norm()


def mixing(options):
    def loop(d):
        total = 0
        for own, other in (("image", "text"), ("text", "image")):
            for i in CANDIDATES:
                x, queue = d[own][i], d[f"queue_{other}"]
                batch = range(B) if options.get("in_batch", True) else [i]
                found = [
                    *(d[other][j] for j in batch),
                    *keys(queue),
                    *mixtures(x, queue, i, other, options),
                ]
                total = (
                    total
                    + log_sum([d["scale"] * (x @ v) for v in found])
                    - d["scale"] * (x @ d[other][i])
                )

        return total / (2 * B)

    return loop


def multi_view(d):
    local = 0
    for x in d["image_views"]:
        for t in d["text_views"]:
            s = d["view_scale"] * x @ t.T
            for score in (s, s.T):
                for i in CANDIDATES:
                    norm = log_sum(score[i])
                    y = [0.9 * (i == j) + 0.1 / B for j in CANDIDATES]
                    local = local - sum(y[j] * (score[i, j] - norm) for j in CANDIDATES) / (2 * B)

    return both(infonce)(d) / (1 + V) + V / (1 + V) * local / V**2


def slip(d):
    v = [*d["image_views"][0], *d["image_views"][1]]

    total = 0
    for i in range(2 * B):
        total = (
            total
            + log_sum(v[i] @ v[k] / 0.1 for k in range(2 * B) if k != i)
            - v[i] @ v[(i + B) % (2 * B)] / 0.1
        )

    return total / (2 * B)


def queue_infonce(d):
    """CE over the batch and the queue of the other modality, plainly."""
    total = 0
    for own, other in (("image", "text"), ("text", "image")):
        columns = torch.stack([*d[other], *keys(d[f"queue_{other}"])])
        logits = d["scale"] * d[own] @ columns.T
        total = total + F.cross_entropy(logits, torch.arange(B)) / 2
    return total


WHOLE = ("image_views", "text_views", "negatives", "negative_images", "counterfactual", "captions")
WHOLE += ("image", "text", "ema_image", "ema_text", "ema_negatives", "queue_image", "queue_text")


def matryoshka(options, *terms):
    """Σ_m c_m Σ_k w_k L_k over the first m numbers of every row; terms: (L_k, w_k)."""
    widths = options["widths"]
    weights = options.get("weights", [1 / len(widths)] * len(widths))

    def loop(d):
        total = 0
        for width, weight in zip(widths, weights):
            narrow = d | {name: F.normalize(d[name][..., :width], dim=-1) for name in WHOLE}
            total = total + weight * sum(w * of_width(narrow) for of_width, w in terms)
        return total

    return loop


def mc_infonce(n_samples):
    """Over the draws of all rows, term by term."""

    def loop(d):
        drawn = {}
        for side in ("image", "text"):
            seeds = [derive(0, "mc_infonce", side, 0, s) for s in range(n_samples)]
            concentration = d[f"{side}_concentration"]
            drawn[side] = list(samples(d[side], concentration, torch.arange(B), seeds))

        total = 0
        for i in CANDIDATES:
            for one, other in (("image", "text"), ("text", "image")):
                share = 0
                for u, v in zip(drawn[one], drawn[other]):
                    positive = torch.exp(d["scale"] * (u[i] @ v[i]))
                    negatives = [torch.exp(d["scale"] * (u[i] @ v[j])) for j in others(i)]
                    share = share + positive / (positive + sum(negatives) / len(negatives))
                total = total - torch.log(share / n_samples) / (2 * B)
        return total

    return loop
