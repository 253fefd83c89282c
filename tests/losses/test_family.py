"""Every objective against a loop written from its equation, in float64, on 1, 2 and 4 ranks,
gathered and on a ring.

The ranks hold different numbers of valid captions, counting samples, tokens and concepts; values
and the gradients of all inputs are compared, through `vlp.losses.build`. (Objectives with a state
for each sample: test_moving.py.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses import captions_loops, distill_loops
from vlp import dist
from vlp.losses import build
from vlp.losses.mixing import draws
from vlp.seeds import derive

B, D, K, J, C, TEACHER = 8, 5, 3, 2, 2, 4
V, Q, R, L, WORDS, CONCEPTS = 2, 11, 3, 4, 6, 3
CANDIDATES = range(B)


def data() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def rows(*shape: int) -> Tensor:
        return F.normalize(
            torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
        ).requires_grad_()

    given = {name: rows(B, D) for name in ("image", "text", "ema_image", "ema_text")}
    given |= {
        "negatives": rows(B, K, D),
        "negative_images": rows(B, J, D),
        "ema_negatives": rows(B, K, D),
        "counterfactual": rows(B, C, D),
    }
    given |= {
        "teacher_image": rows(B, TEACHER),
        "teacher_text": rows(B, TEACHER),
        "teacher_scores": rows(B, K),
    }
    given |= {name: rows(V, B, D) for name in ("image_views", "text_views")}
    given |= {name: rows(Q, D) for name in ("queue_image", "queue_text")}
    given |= {"caption_logits": rows(B, L, WORDS), "concept_logits": rows(B, CONCEPTS)}
    for name, value in (("scale", 5.0), ("bias", -3.0), ("view_scale", 4.0)):
        given[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    # last, so that what the others draw stays as it was
    given["captions"] = rows(B, K, D)
    given |= {name: 2 * rows(B, TEACHER) for name in ("projected_image", "projected_text")}
    given["interactive_scale"] = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    given |= {name: rows(Q, TEACHER) for name in ("queue_teacher_image", "queue_teacher_text")}
    given |= {name: rows(B, R) for name in ("candidate_text_scores", "candidate_image_scores")}
    with torch.no_grad():
        given["queue_image"][:2] = given["queue_text"][5] = 0  # still empty
        given["queue_teacher_image"][:2] = given["queue_teacher_text"][5] = 0
    return given | {
        "teacher_scale": torch.tensor(8.0, dtype=torch.float64),
        # uneven: the first rank of four has no valid caption at all, the third has all
        "negatives_valid": torch.tensor([0, 0, 5, 2, 7, 7, 4, 0])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([4, 2, 1]))
        .bool(),
        # one sample without any caption, one column of the first rank with a single one
        "captions_valid": torch.tensor([4, 6, 7, 0, 7, 5, 3, 1])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([4, 2, 1]))
        .bool(),
        # of the second rank of four none is valid, of the third all are
        "negative_images_valid": torch.tensor([1, 3, 0, 0, 3, 3, 2, 1])
        .unsqueeze(1)
        .bitwise_and(torch.tensor([1, 2]))
        .bool(),
        "counterfactual_valid": torch.tensor([0, 0, 0, 1, 1, 1, 0, 1]).bool(),
        "score": torch.tensor([0, 0.5, 2, 1, 0.1, 3, 1, 0.7], dtype=torch.float64),
        "caption_ids": torch.randint(1, WORDS, (B, L), generator=generator)
        * (torch.arange(L) < torch.arange(B).view(B, 1) - 2),
        # The next rows; of the last two samples none is valid, of the third one.
        "candidate_texts": (torch.arange(B).view(B, 1) + torch.arange(1, R + 1)) % B,
        "candidate_images": (torch.arange(B).view(B, 1) + torch.tensor([5, 2, 3])) % B,
        "pair_score": torch.tensor([0, -1, 0.4, 0, -1, 0.2, 9, 9], dtype=torch.float64),
        "concept_targets": (torch.arange(B * CONCEPTS) % 4).view(B, CONCEPTS).double()
        * (torch.arange(B) % 3 > 0).unsqueeze(1),
    }


LEAVES = (
    "image", "text", "scale", "bias", "negatives", "negative_images", "counterfactual",
    "image_views", "text_views", "view_scale", "caption_logits", "concept_logits", "captions",
    "projected_image", "projected_text", "interactive_scale",
)  # fmt: skip
# Teachers get no gradient.
NEVER = (
    "ema_image", "ema_text", "ema_negatives", "teacher_image", "teacher_text", "teacher_scores",
    "queue_image", "queue_text", "queue_teacher_image", "queue_teacher_text",
    "candidate_text_scores", "candidate_image_scores",
)  # fmt: skip


# Loops, straight from the equations


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


def captions(d, columns=range(K)):
    return [d["negatives"][j, k] for j in CANDIDATES for k in columns if d["negatives_valid"][j, k]]


def negclip(d, columns=range(K)):
    total = 0
    for i in CANDIDATES:
        hard = [d["scale"] * (d["image"][i] @ n) for n in captions(d, columns)]
        total = total + log_sum([*(z(d, i, j) for j in CANDIDATES), *hard]) - z(d, i, i)
        total = total + log_sum(z(d, j, i) for j in CANDIDATES) - z(d, i, i)
    return total / (2 * B)


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


NOTHING = {"mixed_pairs": 0, "mixed_queries": 0}
MIXED = {"hardest": 4, "mixed_pairs": 3, "mixed_queries": 2}
FAMILY = [
    ("infonce", {}, both(infonce)),
    ("siglip", {}, siglip),
    ("uniformity", {}, uniformity),
    ("cross_uniformity", {}, cross_uniformity),
    ("alignment", {}, alignment),
    ("decoupled", {}, both(decoupled)),
    ("decoupled", {"weighted": True}, both(decoupled_weighted)),
    ("hn_nce", {"alpha": 1, "beta": 0.25}, both(hn_nce(1, 0.25))),
    ("hn_nce", {"alpha": 0.5, "beta": 1.5}, both(hn_nce(0.5, 1.5))),
    ("hn_nce", {"alpha": 0, "beta": 0}, both(decoupled)),
    ("hn_nce", {"alpha": 1, "beta": 0}, both(infonce)),
    ("counting", {}, counting(False, 1)),
    ("counting", {"logits": "scaled"}, counting(True, 1)),
    ("counting", {"counterfactuals": "all"}, counting(False, None)),
    ("counting", {"logits": "scaled", "counterfactuals": "all"}, counting(True, None)),
    ("macl", {}, macl),
    ("cyclip", {}, cyclip),
    ("cwcl", {}, cwcl("image", 1)),
    ("cwcl", {"frozen": "text", "sharpening": 4}, cwcl("text", 4)),
    ("distill", {}, distill),
    ("distill", {"form": "ranking"}, ranking),
    ("distill", {"form": "concepts"}, concepts),
    *distill_loops.CASES,
    ("captioning", {}, captioning),
    ("ranked", {}, ranked(1, False)),
    ("ranked", {"power": 2, "normalize": True}, ranked(2, True)),
    ("ranked", {"power": 0}, both(infonce)),
    ("mann_whitney", {"tau": 0.1}, mann_whitney(0.1)),
    ("mann_whitney", {}, mann_whitney(0.01)),
    ("momentum_queue", {}, momentum_queue),
    ("mixing", MIXED, mixing(MIXED)),
    ("mixing", MIXED | {"in_batch": False}, mixing(MIXED | {"in_batch": False})),
    ("mixing", NOTHING, queue_infonce),
    ("multi_view", {}, multi_view),
    ("slip", {}, slip),
    ("self_distillation", {}, self_distillation(False)),
    ("self_distillation", {"negatives": True}, self_distillation(True)),
    ("hard_negatives", {"form": "negclip"}, negclip),
    ("hard_negatives", {"form": "triplet"}, triplet),
    ("hard_negatives", {"form": "own"}, own(0, 0)),
    ("hard_negatives", {"form": "own", "focal": 2, "smoothing": 0.02}, own(2, 0.02)),
    ("hard_negatives", {"form": "text"}, text_grounded),
    ("hard_negatives", {"form": "rank"}, rank([0, 0, 0])),
    ("hard_negatives", {"form": "intra"}, intra),
    *captions_loops.CASES,
    ("hard_negatives", {"form": "sigmoid"}, sigmoid),
    ("hard_negatives", {"form": "sigmoid", "negatives": "images"}, mmclip_images),
    ("hard_negatives", {"form": "own", "negatives": "images"}, own_images),
    ("hard_negatives", {"form": "negclip", "negatives": "images"}, negclip_images),
]
N_LIVE = 185  # inputs that have a gradient, over all cases
PLANS = [(impl, topology) for impl in ("dense", "tiled") for topology in ("global", "ring")]


def gradients_of(value: Tensor, d: dict[str, Tensor]) -> list:
    assert not any(
        g is not None and g.any()
        for g in torch.autograd.grad(
            value, [d[name] for name in NEVER], retain_graph=True, allow_unused=True
        )
    )
    found = torch.autograd.grad(value, [d[name] for name in LEAVES], materialize_grads=True)
    return [value.item(), *(g.tolist() for g in found)]


def own_rows(d: dict[str, Tensor]) -> dict[str, Tensor]:
    mine = slice(dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size())

    def cut(name: str, value: Tensor) -> Tensor:
        if not value.dim() or name.startswith("queue_"):
            return value
        return value[:, mine] if name.endswith("_views") else value[mine]

    return {name: cut(name, value) for name, value in d.items()}


def on_rank() -> list[list]:
    results = []
    for impl, topology in PLANS:
        results.append([])
        for name, options, _ in FAMILY:
            d = data()
            objective = build({name: options}, impl=impl, topology=topology)
            objective.backend = replace(objective.backend, tile_size=3)
            results[-1].append(gradients_of(objective(**own_rows(d))[0], d))

    return results


@pytest.mark.parametrize("n_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_objectives_equal_loops(n_ranks):
    expected = [gradients_of(loop(d), d) for _, _, loop in FAMILY for d in [data()]]
    found = ranks.run(n_ranks, on_rank)

    n_cases = n_live = 0
    for p, plan in enumerate(PLANS):
        for f, (name, options, _) in enumerate(FAMILY):
            for i, leaf in enumerate(("value", *LEAVES)):
                mean = (
                    sum(
                        torch.tensor(found[k][p][f][i], dtype=torch.float64) for k in range(n_ranks)
                    )
                    / n_ranks
                )
                wanted = torch.tensor(expected[f][i], dtype=torch.float64)
                error = (mean - wanted).norm()
                assert error <= 1e-10 * wanted.norm() + 1e-12, (
                    f"{name} {options}, {plan}, {leaf}: {mean} is not {wanted}"
                )
                n_live += i > 0 and bool(wanted.norm() > 1e-6)
            n_cases += 1

    assert n_cases == 4 * len(FAMILY) == 4 * 61 and n_live == 4 * N_LIVE, (
        "the comparison must not be empty"
    )


def test_half_precision_embeddings():
    """bfloat16 inputs against the loops on the same rounded values, at a scale of 20."""
    exact = data()
    with torch.no_grad():
        for value in exact.values():
            if value.is_floating_point() and value.dim():
                value.copy_(value.bfloat16())
        exact["scale"].fill_(20)

    n = 0
    for name, options, loop in FAMILY:
        given = {
            k: v.bfloat16() if v.is_floating_point() and v.dim() else v for k, v in exact.items()
        }
        given = {
            k: v.detach().float() if v.dtype == torch.float64 else v.detach()
            for k, v in given.items()
        }
        for leaf in LEAVES:
            given[leaf].requires_grad_()
        total, _ = build({name: options}, impl="tiled")(**given)
        expected = loop(exact)
        assert total.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6), (
            f"{name} {options}"
        )
        for leaf in LEAVES:
            a, b = (
                torch.autograd.grad(v, d[leaf], retain_graph=True, materialize_grads=True)[
                    0
                ].double()
                for v, d in ((total, given), (expected, exact))
            )
            assert (a - b).norm() <= 1e-2 * b.norm() + 1e-5, f"{name} {options}, {leaf}"
            n += bool(b.norm() > 1e-6)

    assert n == N_LIVE


def aligned() -> dict[str, Tensor]:
    d = data()
    with torch.no_grad():
        d["text"].copy_(F.normalize(d["text"] + d["image"], dim=1))
    return d


def margins_on_rank() -> list:
    d = aligned()
    objective = build({"hard_negatives": {"form": "rank"}})
    first = objective(**own_rows(d), step=0)[0].item()
    saved = objective.state_dict()
    with torch.no_grad():
        objective(**own_rows(d), step=1)  # no gradient: an evaluation moves nothing
    objective(**own_rows(d))  # nor does a call without a step
    margins = [state["hard_negatives.rank"]["margin"] for state in (saved, objective.state_dict())]
    unmoved = torch.equal(*margins)
    later = build({"hard_negatives": {"form": "rank"}})
    later.load_state_dict(saved)
    return [
        first,
        saved["hard_negatives.rank"]["margin"].tolist(),
        unmoved,
        objective(**own_rows(d), step=1)[0].item(),
        later(**own_rows(d), step=1)[0].item(),
    ]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_margin_of_rank_is_the_previous_step_s(n_ranks):
    d = aligned()
    mean = sum(z(d, i, i) for i in CANDIDATES) / B

    margin = []
    for k in range(K):
        live = [i for i in CANDIDATES if d["negatives_valid"][i, k]]
        gap = mean - sum(d["scale"] * (d["image"][i] @ d["negatives"][i, k]) for i in live) / len(
            live
        )
        margin.append(min(max(gap.item(), 0.0), 10.0))

    assert max(margin) > 0
    results = ranks.run(n_ranks, margins_on_rank)
    first, second, loaded = (sum(r[i] for r in results) / n_ranks for i in (0, 3, 4))

    assert first == pytest.approx(rank([0, 0, 0])(d).item(), rel=1e-10)
    assert second == loaded == pytest.approx(rank(margin)(d).item(), rel=1e-10)
    for result in results:
        assert result[1] == pytest.approx(margin, rel=1e-10) and result[2]


def test_uniformity_on_the_sphere_is_the_written_one():
    """−2‖x − y‖² and 4x·y − 4 differ in gradient along x only: through a normalisation they are
    one.
    """
    raw = {
        name: torch.randn(B, D, dtype=torch.float64).requires_grad_() for name in ("image", "text")
    }
    unit = {name: F.normalize(v, dim=1) for name, v in raw.items()}

    def mean_kernel(x, y, cells):
        return torch.log(sum(torch.exp(-2 * distance(x[i], y[j])) for i, j in cells) / len(cells))

    upper = [(i, j) for i in CANDIDATES for j in range(i + 1, B)]
    written = (
        mean_kernel(unit["image"], unit["image"], upper)
        + mean_kernel(unit["text"], unit["text"], upper)
    ) / 2
    written = written + mean_kernel(
        unit["image"], unit["text"], [(i, j) for i in CANDIDATES for j in others(i)]
    )
    total, _ = build({"uniformity": {}, "cross_uniformity": {}})(**unit, scale=1.0)

    torch.testing.assert_close(total, written, rtol=1e-12, atol=0)

    for a, b in zip(
        *(torch.autograd.grad(v, list(raw.values()), retain_graph=True) for v in (total, written))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        assert b.norm() > 1e-2


@pytest.mark.parametrize(
    "name, options, changed, valid",
    [
        ("counting", {}, "counterfactual", "counterfactual_valid"),
        *(
            ("hard_negatives", {"form": k}, "negatives", "negatives_valid")
            for k in ("negclip", "triplet", "own", "text", "rank", "intra")
        ),
        ("self_distillation", {"negatives": True}, "negatives", "negatives_valid"),
    ],
)
def test_invalid_entries_have_no_influence(name, options, changed, valid):
    d = data()
    before = gradients_of(build({name: options})(**d)[0], d)
    with torch.no_grad():
        d[changed][~d[valid]] = d[changed][~d[valid]].roll(1, dims=-1)
    after = gradients_of(build({name: options})(**d)[0], d)
    assert before == after
    with torch.no_grad():
        d[changed][d[valid]] = d[changed][d[valid]].roll(1, dims=-1)
    assert gradients_of(build({name: options})(**d)[0], d)[0] != before[0]
    nothing = build({name: options})(**d | {valid: torch.zeros_like(d[valid])})[0]
    if name == "counting" or options["form" if "form" in options else "negatives"] in (
        "own",
        "text",
        "rank",
    ):
        assert nothing == 0 and not any(torch.tensor(g).any() for g in gradients_of(nothing, d)[1:])


@pytest.mark.parametrize("name", ["uniformity", "cross_uniformity", "decoupled", "hn_nce", "macl"])
def test_terms_over_other_rows_need_two(name):
    d = {k: v[:1] if v.dim() else v for k, v in data().items()}
    with pytest.raises(ValueError, match=f"'{name}' needs at least 2 candidates a row, found 1"):
        build({name: {}})(**d)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("decoupled", {"sigma": 0}, "expected a number > 0"),
        ("hn_nce", {"beta": -1}, "expected numbers >= 0"),
        ("macl", {"alpha": 1}, "temperature could become negative"),
        ("cwcl", {"frozen": "txt"}, "did you mean 'text'"),
        ("hard_negatives", {"form": "negclip", "focal": 2}, "belong to form: own"),
        ("hard_negatives", {"form": "text", "negatives": "images"}, "no sides to exchange"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


@pytest.mark.parametrize("form", ["negclip", "triplet"])
def test_one_candidate_without_a_valid_caption_gives_zero_and_no_gradient(form):
    shapes = {"image": (1, 4), "text": (1, 4)}
    shapes |= {"negatives": (1, 2, 4), "negative_images": (1, 1, 4)}
    unit = torch.nn.functional.normalize
    d = {
        n: unit(torch.randn(shape, dtype=torch.float64), dim=-1).requires_grad_()
        for n, shape in shapes.items()
    }
    total, _ = build({"hard_negatives": {"form": form}})(
        **d,
        negatives_valid=torch.zeros(1, 2, dtype=torch.bool),
        negative_images_valid=torch.zeros(1, 1, dtype=torch.bool),
        scale=10.0,
    )

    assert total == 0
    # And none is NaN.
    assert all(
        not g.any() for g in torch.autograd.grad(total, list(d.values()), materialize_grads=True)
    )
