"""Special cases of candidates that are positives, ignored or too easy: what equals what, what is
logged, a step in micro-batches, float32 at a scale of 100, and what is refused.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses.family_data import B, Q
from tests.losses.loops import CLUSTERS, LABELS, data
from tests.losses.test_candidates import DELTA, FORMS, LABEL
from tests.pairwise import exact
from vlp import dist, plugin
from vlp.losses import build
from vlp.step import Training, train_step
from vlp.types import Batch


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
