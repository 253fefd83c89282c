"""Candidates that are positives, ignored or too easy: every option against a loop written from its
equation, in float64 with all gradients, on 1, 2 and 4 ranks, gathered and on a ring.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.losses import loops
from tests.losses.family_data import B, Q

DELTA, PHI, RHO = 0.2, 0.3, 0.1


# Loops, straight from the equations


def cosine(d, anchor: str, i: int, j: int) -> Tensor:
    """s of anchor row i with candidate j of the other modality."""
    other = {"image": "text", "text": "image"}[anchor]
    return d[anchor][i] @ d[other][j]


def is_positive(options, d, i, j):
    return i == j or ("positives" in options and bool(d["label"][i] == d["label"][j]))


def is_ignored(options, d, anchor, i, j, score):
    """Whether the negative j of row i leaves its denominator; score: its cosine."""
    ignore = options.get("ignore", {})
    return (
        (ignore.get("same_label") and d["label"][i] == d["label"][j])
        or (ignore.get("cluster") and d["cluster"][i] == d["cluster"][j])
        or score > d["image"][i] @ d["text"][i] + ignore.get("margin", math.inf)
        or is_alike(ignore.get("teacher"), d, anchor, i, j)
    )


def is_alike(teacher, d, anchor, i, j):
    """Whether the teacher finds row i and candidate j alike; across, it compares an image first."""
    if teacher is None:
        return False
    sides = {"image": ("image", "image"), "text": ("text", "text"), "cross": ("image", "text")}
    u, v = (d[f"teacher_{side}"].detach() for side in sides[teacher.get("of", "text")])
    first, second = (i, j) if anchor == "image" else (j, i)
    return u[first] @ v[second] >= teacher["above"]


def candidates_of(options, d, anchor, i):
    """(positives, negatives) of a row, as places; the hardest negatives first."""
    positives = [j for j in range(B) if is_positive(options, d, i, j)]
    negatives = []
    for j in range(B):
        score = cosine(d, anchor, i, j)
        if j not in positives and not is_ignored(options, d, anchor, i, j, score):
            negatives.append(j)
    negatives.sort(key=lambda j: -cosine(d, anchor, i, j).item())
    return positives, negatives[: options.get("hardest", B)]


def within(options, d, anchor, i):
    """Scores of the negatives of the row's own modality."""
    if options.get("within") not in (anchor, "both"):
        return []
    scores = []
    for j in range(B):
        score = d[anchor][i] @ d[anchor][j]
        if not is_positive(options, d, i, j) and not is_ignored(options, d, anchor, i, j, score):
            scores.append(d["scale"] * score)
    return scores


def total(values):
    return sum(torch.exp(v) for v in values)


def formed(form, alpha, positives, hard):
    """The loss of a row by its positives' scores and the weighted sum over its negatives."""
    if form == "out":
        losses = [torch.log((alpha * total(positives) + hard) / torch.exp(p)) for p in positives]
        return sum(losses) / len(losses)
    if form == "in":
        return torch.log(alpha + hard / total(positives))
    return sum(torch.log(alpha + hard / torch.exp(p)) for p in positives) / len(positives)


def softmax_loop(options, alpha=1.0, beta=None):
    def loop(d):
        mean = 0
        for anchor in ("image", "text"):
            for i in range(B):
                positives, negatives = candidates_of(options, d, anchor, i)
                z = [d["scale"] * cosine(d, anchor, i, j) for j in negatives]
                hard = total(z)
                if beta is not None and z:
                    flat = total(beta * v for v in z)
                    hard = len(z) * total((1 + beta) * v for v in z) / flat
                hard = hard + total(within(options, d, anchor, i))
                own = [d["scale"] * cosine(d, anchor, i, j) for j in positives]
                if alpha == 0 and not (z or within(options, d, anchor, i)):
                    continue
                form = options.get("form", "out")
                mean = mean + formed(form, alpha, own, hard) / (2 * B)
        return mean

    return loop


def siglip_loop(options):
    def loop(d):
        mean = 0
        for i in range(B):
            positives, negatives = candidates_of(options, d, "image", i)
            for j in positives:
                score = d["scale"] * cosine(d, "image", i, j) + d["bias"]
                mean = mean + torch.log(1 + torch.exp(-score)) / B
            others = [d["scale"] * cosine(d, "image", i, j) for j in negatives]
            for anchor in ("image", "text"):
                others += within(options, d, anchor, i)
            mean = mean + sum(torch.log(1 + torch.exp(v + d["bias"])) for v in others) / B
        return mean

    return loop


def queue_loop(options):
    def loop(d):
        mean, ignore = 0, options.get("ignore", {})
        for anchor, other in (("image", "text"), ("text", "image")):
            keys = d[f"queue_{other}"].detach()
            held = [q for q in range(Q) if keys[q].any()]
            for i in range(B):
                key = d[f"ema_{other}"][i].detach()
                own, scores = d[anchor][i] @ key, {q: d[anchor][i] @ keys[q] for q in held}
                labelled = [q for q in held if d["queue_label"][q] == d["label"][i]]
                positives = labelled if "positives" in options else []
                negatives = [
                    q
                    for q in held
                    if q not in positives
                    and not (ignore.get("same_label") and q in labelled)
                    and scores[q] <= own + ignore.get("margin", math.inf)
                    and key @ keys[q] < ignore.get("queue", math.inf)
                ]
                negatives.sort(key=lambda q: -scores[q].item())
                z = [scores[q] / 0.07 for q in negatives[: options.get("hardest", Q)]]
                p = [own / 0.07, *(scores[q] / 0.07 for q in positives)]
                mean = mean + formed(options.get("form", "out"), 1, p, total(z)) / (2 * B)
        return mean

    return loop


LOOPS = {
    "infonce": softmax_loop,
    "decoupled": lambda options: softmax_loop(options, alpha=0.0),
    "hn_nce": lambda options: softmax_loop(options, options.get("alpha", 1.0), 0.25),
    "siglip": siglip_loop,
    "momentum_queue": queue_loop,
}
LABEL = {"positives": "label"}
FORMS = ("out", "in", "decoupled")
MASKS = [
    {"same_label": True},
    {"margin": DELTA},
    {"teacher": {"above": PHI}},
    {"teacher": {"above": PHI, "of": "image"}},
    {"teacher": {"above": PHI, "of": "cross"}},
    {"cluster": True},
]
CASES = [
    *((name, LABEL | {"form": form}) for name in ("infonce", "decoupled") for form in FORMS),
    *(("hn_nce", LABEL | {"form": form, "alpha": 0.5}) for form in FORMS),
    *(("momentum_queue", LABEL | {"form": form}) for form in FORMS),
    ("siglip", LABEL),
    ("infonce", {"positives": "caption"}),
    ("siglip", {"positives": "origin"}),
    *(("infonce", {"ignore": mask}) for mask in MASKS),
    ("infonce", {"ignore": {"margin": DELTA, "cluster": True}}),
    ("infonce", LABEL | {"ignore": {"margin": DELTA}, "form": "in"}),
    ("decoupled", {"ignore": {"margin": DELTA}}),
    ("hn_nce", {"ignore": {"teacher": {"above": PHI}}}),
    ("siglip", {"ignore": {"margin": DELTA, "same_label": True}}),
    ("momentum_queue", {"ignore": {"same_label": True}}),
    ("momentum_queue", {"ignore": {"margin": DELTA}}),
    ("momentum_queue", {"ignore": {"queue": RHO}}),
    ("momentum_queue", LABEL | {"ignore": {"queue": RHO}, "form": "decoupled"}),
    ("infonce", {"hardest": 2}),
    ("infonce", LABEL | {"hardest": 3, "form": "decoupled"}),
    ("infonce", {"hardest": 2, "ignore": {"margin": DELTA}}),
    ("decoupled", {"hardest": 1}),
    ("hn_nce", {"hardest": 3}),
    ("siglip", {"hardest": 2}),
    ("momentum_queue", {"hardest": 4}),
    ("momentum_queue", LABEL | {"hardest": 4}),
    ("infonce", {"within": "image"}),
    ("infonce", LABEL | {"within": "both", "form": "in"}),
    ("infonce", {"within": "text", "ignore": {"margin": DELTA, "same_label": True}}),
    ("decoupled", {"within": "both"}),
    ("hn_nce", {"within": "text", "alpha": 0.5}),
    ("siglip", {"within": "image"}),
    ("siglip", LABEL | {"within": "both"}),
]


# One of each kind, for the plans with several ranks.
ON_RANKS = [
    ("infonce", LABEL),
    ("infonce", LABEL | {"ignore": {"margin": DELTA}, "form": "in"}),
    ("infonce", LABEL | {"hardest": 3, "form": "decoupled"}),
    ("infonce", {"ignore": {"teacher": {"above": PHI, "of": "cross"}}}),
    ("infonce", {"within": "text", "ignore": {"margin": DELTA, "same_label": True}}),
    ("decoupled", LABEL | {"form": "decoupled"}),
    ("hn_nce", {"hardest": 3}),
    ("siglip", LABEL | {"within": "both"}),
    ("momentum_queue", LABEL | {"ignore": {"queue": RHO}, "form": "decoupled"}),
]


@pytest.mark.parametrize("n_ranks, cases", [(1, CASES), (2, ON_RANKS), (4, ON_RANKS)])
def test_options_equal_loops(n_ranks, cases):
    loops.assert_equal(
        n_ranks, [((name, options), LOOPS[name](options)) for name, options in cases]
    )
    assert len(CASES) == 45
