"""What takes no part has no influence at all: NaN and infinity there change no bit of a value or a
gradient.

And what is not finite where it does take part is never written into a state.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.losses.family_data import LEAVES, B, L, data
from tests.losses.test_moving import IDS, made
from tests.losses.test_moving import rows as moving_rows
from vlp.losses import build
from vlp.losses._table import Table

# The entries that take no part, as an index of the keyword.
Slots = Callable[[dict[str, Tensor]], Tensor]


def invalid(d):
    return ~d["negatives_valid"]


def uncounted(d):
    return ~d["counterfactual_valid"]


def without_first(d):
    slots = ~d["negative_images_valid"]
    slots[:, 0] |= ~d["negatives_valid"][:, 0]
    slots[:, 1:] = True
    return slots


def invalid_images(d):
    return ~d["negative_images_valid"]


def behind_first(d):
    """Of triplets only the first caption is read, even where others are valid."""
    slots = invalid(d).clone()
    slots[:, 1:] = True
    return slots


def padding(d):
    return d["caption_ids"] == 0


def unnamed(d):
    return d["concept_targets"].sum(1) == 0


def empty(name):
    return lambda d: ~d[name].any(1)


def third(d):
    return torch.tensor([False, False, True])


def second_counterfactual(d):
    slots = uncounted(d).unsqueeze(1).repeat(1, 2)
    slots[:, 1] = True
    return slots


def forms(*names: str) -> list[dict[str, str]]:
    return [{"form": name} for name in names]


CASES: list[tuple[str, dict, str, Slots]] = [
    *(
        ("hard_negatives", o, "negatives", invalid)
        for o in forms("negclip", "own", "text", "rank", "intra")
    ),
    ("hard_negatives", {"form": "own", "focal": 2, "smoothing": 0.02}, "negatives", invalid),
    ("hard_negatives", {"form": "own", "focal": 0.5, "smoothing": 0.1}, "negatives", invalid),
    ("hard_negatives", {"form": "triplet"}, "negatives", behind_first),
    ("hard_negatives", {"form": "triplet"}, "negative_images", without_first),
    ("hard_negatives", {"form": "sigmoid"}, "negatives", invalid),
    *(
        ("hard_negatives", o | {"negatives": "images"}, "negative_images", invalid_images)
        for o in forms("negclip", "own", "rank", "intra", "sigmoid")
    ),
    ("self_distillation", {"negatives": True}, "negatives", invalid),
    ("self_distillation", {"negatives": True}, "ema_negatives", invalid),
    ("distill", {"form": "ranking"}, "negatives", invalid),
    ("distill", {"form": "ranking"}, "teacher_scores", invalid),
    *(
        ("distill", options, keyword, invalid)
        for options in ({"form": "margin"}, {"form": "ranking", "delta": 0.5})
        for keyword in ("negatives", "teacher_scores")
    ),
    ("distill", {"form": "concepts"}, "concept_logits", unnamed),
    *(
        ("counting", {"logits": x, "counterfactuals": "all"}, "counterfactual", uncounted)
        for x in ("raw", "scaled")
    ),
    ("counting", {}, "counterfactual", second_counterfactual),
    ("captioning", {}, "caption_logits", padding),
    ("captioning", {}, "caption_nll", padding),
    *(
        ("distill", {"form": "interactive", "queue": True}, queue, empty(queue))
        for queue in ("queue_teacher_image", "queue_teacher_text")
    ),
    *(
        (name, {}, queue, empty(queue))
        for name in ("mixing", "momentum_queue")
        for queue in ("queue_image", "queue_text")
    ),
    ("slip", {}, "image_views", third),
]


def inputs(keyword: str) -> dict[str, Tensor]:
    d = data()
    if keyword == "caption_nll":
        d = d | {
            "caption_nll": torch.rand(B, L, dtype=torch.float64).requires_grad_(),
            "caption_logits": None,
        }

    if keyword == "image_views":
        d["image_views"] = torch.cat(
            [d["image_views"].detach(), d["image_views"].detach()[:1].flip(1)]
        ).requires_grad_()
    return d


def value_and_gradients(name: str, options: dict, d: dict[str, Tensor]) -> dict[str, Tensor]:
    total, _ = build({name: options})(**d, step=0)
    leaves = {
        k: v
        for k, v in d.items()
        if v is not None and v.requires_grad and k in (*LEAVES, "caption_nll")
    }
    gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return {"value": total.detach(), **dict(zip(leaves, gradients))}


def test_nothing_in_a_masked_slot_has_any_influence():
    n = 0
    for name, options, keyword, slots in CASES:
        torch.manual_seed(0)
        d = inputs(keyword)
        where = slots(d)
        assert where.any() and not where.all()
        expected = value_and_gradients(name, options, d)
        assert expected["value"].isfinite() and any(g.any() for g in expected.values())
        fillings = (torch.nan, torch.inf, -torch.inf, 1e300)
        for filling in fillings[
            : 3 if keyword.startswith("queue") else 4
        ]:  # a row of large numbers is a key
            with torch.no_grad():
                d[keyword][where] = filling
            found = value_and_gradients(name, options, d)
            for key, value in found.items():
                assert torch.equal(value, expected[key]), (
                    f"{name} {options}: {filling} in {keyword} changes {key}"
                )
            if keyword in found:
                assert not found[keyword][where].any()
            n += 1

    assert n == 4 * len(CASES) - 6 == 138


def test_the_same_holds_where_nothing_is_valid():
    n = 0
    for name, options, keyword, valid in (
        *(
            ("hard_negatives", o, "negatives", "negatives_valid")
            for o in forms("negclip", "triplet", "own", "text", "rank", "intra")
        ),
        (
            "hard_negatives",
            {"form": "own", "focal": 0.5, "smoothing": 0.1},
            "negatives",
            "negatives_valid",
        ),
        ("distill", {"form": "ranking"}, "negatives", "negatives_valid"),
        ("distill", {"form": "margin"}, "negatives", "negatives_valid"),
        ("counting", {}, "counterfactual", "counterfactual_valid"),
    ):
        d = data()
        d[valid] = torch.zeros_like(d[valid])
        with torch.no_grad():
            d[keyword].fill_(torch.nan)
        found = value_and_gradients(name, options, d)
        assert all(value.isfinite().all() for value in found.values()), f"{name} {options}"
        n += 1

    assert n == 10


# State

MOVING = [
    ("sogclr", {}),
    ("isogclr", {}),
    ("fastclip", {"version": "v1"}),
    ("fastclip", {"version": "v2"}),
    ("fastclip", {}),
]


def test_numbers_of_samples_are_not_written_by_what_is_not_finite():
    n = 0
    for name, options in MOVING:
        for broken in (torch.nan, torch.inf):
            objective = made(name, options)
            objective(**moving_rows(0), sample_id=torch.tensor(IDS[0]), step=0)
            before = objective.state_dict()[name]["samples"]
            bad = moving_rows(1)
            with torch.no_grad():
                bad["image"][3] = broken
            total, _ = objective(**bad, sample_id=torch.tensor(IDS[1]), step=1)
            after = objective.state_dict()[name]["samples"]
            assert not total.isfinite() and torch.equal(before, after), f"{name} {options}"
            assert objective(**moving_rows(1), sample_id=torch.tensor(IDS[1]), step=1)[0].isfinite()
            assert not torch.equal(before, objective.state_dict()[name]["samples"])
            n += 1

    assert n == 2 * len(MOVING)


def test_of_a_table_only_the_rows_that_are_not_finite_stay():
    from vlp import dist

    table = Table((0.0, 0.0), 4)
    table.place(dist.world())
    table.write(torch.tensor([1, 2]), torch.tensor([[1.0, torch.nan], [3.0, 4.0]]))

    assert table.whole().tolist() == [[0, 0], [0, 0], [3, 4], [0, 0]]
    table.write(torch.tensor([0]), torch.tensor([[torch.inf, 1.0]]))
    assert table.whole().tolist() == [[0, 0], [0, 0], [3, 4], [0, 0]]


@pytest.mark.parametrize("keyword", ["image", "text", "negatives"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_margins_are_not_moved_by_what_is_not_finite(keyword, broken):
    objective = build({"hard_negatives": {"form": "rank"}})
    objective(**data(), step=0)
    before = objective.state_dict()["hard_negatives.rank"]["margin"]
    d = data()
    with torch.no_grad():
        d[keyword][4] = broken  # all its captions are valid
    objective(**d, step=1)
    assert torch.equal(before, objective.state_dict()["hard_negatives.rank"]["margin"])
