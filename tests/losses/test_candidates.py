"""Candidates that are positives, ignored or too easy: every option against a loop written from its
equation, in float64 with all gradients, on 1, 2 and 4 ranks, gathered and on a ring.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses import loops
from tests.losses.loops import CLUSTERS, LABELS, data
from tests.losses.test_family import B, Q
from tests.pairwise import exact
from vlp import dist, plugin
from vlp.losses import build
from vlp.step import Training, train_step
from vlp.types import Batch

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


# Special cases


def values(name: str, options: dict, **changes) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
    """(value, what is logged, gradients of image and text)."""
    d = data() | changes
    total, terms = build({name: options})(**d)
    gradients = torch.autograd.grad(total, [d["image"], d["text"]])
    return total.detach(), terms, list(gradients)


def assert_same(first: tuple, second: tuple) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-12, atol=1e-12)
    for a, b in zip(first[2], second[2]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


ALONE, TOGETHER = torch.arange(B), torch.zeros(B, dtype=torch.int64)
NAMES = ("infonce", "decoupled", "hn_nce", "siglip", "momentum_queue")


@pytest.mark.parametrize("name", NAMES)
def test_masks_that_name_nothing_change_nothing(name):
    plain = values(name, {})
    far = {"margin": 3.0}
    if name == "momentum_queue":
        ignored = [far, {"queue": 1.5}]
        no_keys = {"label": ALONE, "queue_label": torch.full((Q,), -1)}
        most = {"hardest": Q}
    else:
        ignored = [far, {"teacher": {"above": 1.5}}, {"same_label": True}, {"cluster": True}]
        no_keys = {"label": ALONE, "cluster": ALONE}
        most = {"hardest": B - 1}

    options = [{"ignore": ignore} for ignore in ignored] + [most, {"positives": "label"}]
    if name != "siglip":
        options += [{"positives": "label", "form": form} for form in FORMS]
    for chosen in options:
        found = values(name, chosen, **no_keys)
        assert_same(found, plain)
        shown = {key: float(share) for key, share in found[1].items() if key != name}
        assert shown in ({}, {f"{name}.ignored": 0.0}, {f"{name}.positives": 1.0}), chosen


@pytest.mark.parametrize("form", ["in", "decoupled"])
def test_everything_positive_is_worth_nothing(form):
    options = {"positives": "label", "form": form}
    for name in ("infonce", "decoupled"):
        total, terms, gradients = values(name, options, label=TOGETHER)
        assert total == 0 and not any(g.any() for g in gradients)
        assert terms[f"{name}.positives"] == B


def test_everything_positive_of_a_supervised_loss_is_a_mean_over_all():
    d = data()
    total, _, _ = values("infonce", {"positives": "label"}, label=TOGETHER)
    z = d["scale"] * d["image"] @ d["text"].T
    expected = -(torch.log_softmax(z, 1) + torch.log_softmax(z, 0)).mean() / 2
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)


def test_everything_ignored_leaves_the_pair():
    for name in ("infonce", "decoupled"):
        for ignore in ({"same_label": True}, {"margin": -3.0}):
            total, terms, gradients = values(name, {"ignore": ignore}, label=TOGETHER)
            assert total == 0 and not any(g.any() for g in gradients)
            assert terms[f"{name}.ignored"] == 1


def test_weighted_negatives_meet_the_other_two():
    """hn_nce with β = 0 is infonce at α = 1 and decoupled at α = 0, positives and masks as well."""
    n = 0
    for form in FORMS:
        for others in ({}, {"ignore": {"margin": DELTA}}, {"hardest": 3}):
            options = LABEL | {"form": form} | others
            for name, alpha in (("infonce", 1.0), ("decoupled", 0.0)):
                weighted = values("hn_nce", options | {"alpha": alpha, "beta": 0.0})
                assert_same(weighted, values(name, options))
                n += 1
    assert n == 18


def test_copies_of_one_caption_have_all_their_images_right():
    """Two samples with one caption and one image: with labels no copy is the other's negative."""
    twins = torch.arange(B) // 2
    d = {name: data()[name].detach()[twins] for name in ("image", "text")}
    aligned = {"image": d["image"], "text": d["image"].clone(), "scale": torch.tensor(100.0)}
    blind = build({"infonce": {}})(**aligned)[0]
    told = build({"infonce": {"positives": "label", "form": "in"}})(**aligned, label=twins)[0]
    assert blind > math.log(2) - 0.01 and told < 0.1 * blind


def test_what_the_masks_did_is_logged():
    d = data()
    _, terms = build({"infonce": LABEL | {"ignore": {"cluster": True}}})(**d)
    counts = [int((label == LABELS).sum()) for label in LABELS]
    assert terms["infonce.positives"].item() == pytest.approx(sum(counts) / B)

    shares = []
    for i in range(B):
        negatives = [j for j in range(B) if LABELS[j] != LABELS[i]]
        ignored = [j for j in negatives if CLUSTERS[j] == CLUSTERS[i]]
        shares.append(len(ignored) / len(negatives))
    assert terms["infonce.ignored"].item() == pytest.approx(sum(shares) / B)


# Through a step


def step_on_rank(micro_batches: int) -> list:
    """Loss and parameter gradients of one step of linear towers over 12 rows with labels."""
    case = exact.Case("infonce", "tiled", dist.world_size(), rows=12 // dist.world_size())
    x, t = exact.own_rows(case, *exact.pairs_of(case))
    (label,) = exact.own_rows(case, torch.arange(12) % 5)
    model = exact.LinearTowers(case.scale)
    objective = build({"infonce": LABEL | {"ignore": {"margin": 0.5}, "form": "decoupled"}})
    training = Training(
        exact.PlainEngine(model), objective, lambda step: 0.0, micro_batches=micro_batches
    )
    numbers = torch.arange(len(x))
    batch = Batch(x, t, numbers, [str(number) for number in numbers.tolist()], label=label)
    scalars = train_step(training, batch)
    shown = [scalars[name].item() for name in ("loss", "infonce.positives", "infonce.ignored")]
    return [shown, *(gradient.tolist() for gradient in model.gradients())]


def test_micro_batches_and_ranks_change_nothing():
    expected = step_on_rank(1)
    assert expected[0][1] > 2 and 0 < expected[0][2] < 1

    for by_rank in ([step_on_rank(3)], ranks.run(2, step_on_rank, 3)):
        for i, values in enumerate(expected):
            parts = [torch.tensor(result[i], dtype=torch.float64) for result in by_rank]
            wanted = torch.tensor(values, dtype=torch.float64)
            error = (torch.stack(parts).mean(0) - wanted).norm()
            assert error <= 1e-10 * wanted.norm() + 1e-12
    assert len(expected) == 5


# Half precision, and a scale of 100


def test_positives_keep_their_gradient_at_a_scale_of_100():
    """float32 against float64 where rows are sure of their positives, and where they are not."""
    n = 0
    for noise in (0.02, 0.3, 1.0):
        for name in ("infonce", "decoupled", "hn_nce"):
            for form in FORMS:
                generator = torch.Generator().manual_seed(0)
                middle = F.normalize(torch.randn(4, 48, generator=generator), dim=1)
                rows = middle.repeat_interleave(2, 0)
                image, text = (
                    F.normalize(rows + noise * torch.randn(8, 48, generator=generator) / 7, dim=1)
                    for _ in range(2)
                )
                found = []
                for dtype in (torch.float32, torch.float64):
                    leaves = [side.to(dtype).requires_grad_() for side in (image, text)]
                    total, _ = build({name: LABEL | {"form": form}}, impl="tiled")(
                        image=leaves[0],
                        text=leaves[1],
                        scale=torch.tensor(100.0, dtype=dtype),
                        label=torch.arange(8) // 2,
                    )
                    found.append([total.detach(), *torch.autograd.grad(total, leaves)])
                for narrow, wide in zip(*found):
                    # Two positives at the same score hold each other at ½, a difference of which
                    # float32 keeps seven digits.
                    floor = 1e-4 if form == "out" else 1e-12
                    error = (narrow - wide).norm()
                    assert error <= 1e-4 * wide.norm() + floor, f"{name} {form}"
                    n += 1
    assert n == 81


# Bad options and bad input


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("infonce", {"positives": "labels"}, "did you mean 'label'"),
        ("infonce", {"form": "inside"}, "known"),
        ("infonce", {"hardest": 0}, "expected at least 1"),
        ("infonce", {"ignore": {"margins": 1}}, "did you mean 'margin'"),
        ("infonce", {"ignore": {"teacher": {"of": "audio"}}}, "'audio' is not a choice"),
        ("infonce", LABEL | {"ignore": {"same_label": True}}, "are positives"),
        ("infonce", {"hardest": 2, "within": "image"}, "drop one of the two"),
        ("infonce", LABEL | {"label_smoothing": 0.1}, "drop one of the two"),
        ("infonce", {"ignore": {"queue": 0.9}}, "has no queue"),
        ("decoupled", LABEL | {"weighted": True}, "weighs the one positive"),
        ("siglip", {"form": "in"}, "unknown key 'form'"),
        ("momentum_queue", {"within": "image"}, "nothing of the kind is known"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


def test_bad_labels_are_named():
    d = data()
    cases = [
        ({"label": None}, "needs 'label'"),
        ({"label": LABELS[::2]}, "label: found .4., expected"),  # one on every second sample
        ({"label": LABELS.float()}, "label: found float32, expected int64"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            build({"infonce": LABEL})(**d | changes)
    with pytest.raises(ValueError, match="hardest: found 8 of 7 other candidates; use at most 7"):
        build({"infonce": {"hardest": 8}})(**d)
    with pytest.raises(ValueError, match="needs 'queue_label'"):
        build({"momentum_queue": LABEL})(**d | {"queue_label": None})


@pytest.mark.parametrize("name", NAMES)
def test_every_term_has_the_options(name):
    options = plugin.load("vlp.losses", name).Options()
    assert options.plain and {"positives", "ignore", "hardest", "within"} <= vars(options).keys()
