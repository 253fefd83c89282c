"""What the forms of `distill` equal, several teachers, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses import distill_loops
from tests.losses.family_data import Q, R, data, own_rows
from vlp.losses import build
from vlp.losses.distill import hardest
from vlp.pairwise import Backend, Pairs

FORMS = ("similarity", "features", "interactive", "cross")
NARROW, WIDE = 4, 6  # widths of two teachers


def value(options: dict, d: dict[str, Tensor | None]) -> Tensor:
    return build({"distill": options})(**d)[0].detach()


def rows(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def itself(d: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The student as its own teacher, without a head."""
    head = ("projected_image", "projected_text", "interactive_scale")
    teacher = {f"teacher_{side}": d[side].detach() for side in ("image", "text")}
    return d | teacher | {"teacher_scale": d["scale"].detach()} | dict.fromkeys(head)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    d = itself(data())
    assert value({"form": "features"}, d) == 0
    assert abs(value({"form": "cross"}, d)) < 1e-14
    plain = build({"infonce": {}})(**d)[0].detach()
    torch.testing.assert_close(value({"form": "interactive"}, d), plain, rtol=1e-12, atol=0)

    cosines = torch.einsum("bd,bkd->bk", d["image"], d["negatives"]).detach()
    scores = {"score": (d["image"] * d["text"]).sum(1).detach(), "teacher_scores": cosines}
    assert value({"form": "margin"}, d | scores) < 1e-30


def test_a_focus_of_nothing_and_a_list_of_one_change_nothing():
    d = data()
    for form in FORMS:
        plain, unfocused = (value({"form": form} | more, d) for more in ({}, {"focus": 0}))
        assert torch.equal(plain, unfocused)
        assert abs(value({"form": form, "focus": 2}, d) - plain) > 1e-4

    # One candidate alone scores as high as the pair.
    first = torch.zeros_like(d["teacher_scores"])
    first[:, 0] = 1
    valid = torch.ones_like(d["negatives_valid"])
    one = {"teacher_scores": first, "score": torch.ones(8, dtype=first.dtype)}
    assert value({"form": "ranking", "delta": 0}, d | one | {"negatives_valid": valid}) == 0


def two_teachers() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A call with two teachers of different widths, and one call for each of them."""
    d, apart = data(), []
    names = ("teacher_image", "teacher_text", "projected_image", "projected_text")
    for place, width in enumerate((NARROW, WIDE)):
        of_one = {name: rows(100 * place + i, 8, width) for i, name in enumerate(names)}
        for i, side in enumerate(("image", "text")):
            of_one[f"queue_teacher_{side}"] = rows(100 * place + 50 + i, Q, width)
        apart.append(of_one | {"teacher_scale": torch.tensor(5.0 + 3 * place)})

    together = {"teacher_scale": torch.stack([of_one["teacher_scale"] for of_one in apart])}
    for name in apart[1].keys() - together.keys():
        padded = [F.pad(of_one[name], (0, WIDE - of_one[name].shape[1])) for of_one in apart]
        together[name] = torch.stack(padded, 1)
    return d | together, [d | of_one for of_one in apart]


def values_together() -> list[float]:
    d, _ = two_teachers()
    d = own_rows(d) | {"teacher_scale": d["teacher_scale"]}  # a number of each teacher, of no row
    options = [{"form": form} for form in FORMS] + [{"form": "interactive", "queue": True}]
    return [value(one, d).item() for one in options]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_several_teachers_give_the_mean_of_their_losses(n_ranks):
    _, apart = two_teachers()
    by_rank = torch.tensor(ranks.run(n_ranks, values_together), dtype=torch.float64)
    options = [{"form": form} for form in FORMS] + [{"form": "interactive", "queue": True}]
    for place, one in enumerate(options):
        expected = torch.stack([value(one, d) for d in apart]).mean()
        torch.testing.assert_close(by_rank[:, place].mean(), expected, rtol=1e-12, atol=0)


def test_candidates_come_from_the_queue_too():
    """The places `hardest` names are those of a sort, and the ranking of them is the loop's."""
    d, pairs = data(), Pairs.at(Backend())
    queued = distill_loops.BATCH | {"delta": 0.3, "queue": True}
    for own, other in (("image", "text"), ("text", "image")):
        queue = d[f"queue_{other}"].detach()
        places = hardest(d[own], d[other], R, pairs, queue)
        scores = d[own].detach() @ torch.cat([d[other].detach(), queue]).T
        scores[:, :8].fill_diagonal_(-torch.inf)
        scores[:, 8:][:, ~queue.any(1)] = -torch.inf
        assert torch.equal(places, scores.topk(R, 1).indices)
        d[f"candidate_{other}s"] = places
    assert (d["candidate_texts"] >= 8).any()
    expected = distill_loops.candidates(0.3, queued=True)(d).detach()
    torch.testing.assert_close(value(queued, d), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "ranking"},
        {"form": "ranking", "delta": 0.2},
        {"form": "margin"},
        {"form": "ranking", "divergence": "symmetric"},
    ],
)
def test_what_a_judge_did_not_score_takes_no_part(options):
    """NaN for a caption is as an invalid one, for a text as a sample without captions."""
    d, objective = data(), build({"distill": options})
    d["image"] = d["image"].detach().requires_grad_()
    valid = d["negatives_valid"].clone()
    valid[:, 1] = False
    scores = d["teacher_scores"].clone()
    scores[:, 1] = torch.nan
    needs_text = "score" in objective.needs
    texts = d["score"].clone()
    if needs_text:
        valid[3], texts[3] = False, torch.nan

    results = []
    for changes in ({"negatives_valid": valid}, {"teacher_scores": scores, "score": texts}):
        total, _ = objective(**d | changes)
        results.append((total, *torch.autograd.grad(total, d["image"])))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert results[0][0] > 0


def test_widths_that_nothing_maps_are_named():
    d = data() | dict.fromkeys(("projected_image", "projected_text"))
    for form in FORMS[1:]:
        with pytest.raises(ValueError, match=r"width 4, the student's 5: set model\.heads\.teach"):
            value({"form": form}, d)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"focus": -1}, "focus: found -1"),
        ({"form": "margin", "gamma": 0}, "gamma: found 0"),
        ({"form": "ranking", "delta": -0.1}, "delta: found -0.1"),
        ({"form": "margin", "focus": 1}, "focus: belongs to form: similarity, features"),
        ({"queue": True}, "queue: belongs to form: interactive"),
        ({"delta": 0.1}, "delta: belongs to form: ranking"),
        ({"candidates": "batch"}, "candidates: batch: belongs to form: ranking"),
        ({"gamma": 2}, "gamma: belongs to form: margin"),
    ],
)
def test_options_of_another_form_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build({"distill": options})
