"""What terms over more than two modalities equal in special cases, how they take samples that lack
one, and what they refuse.

test_family.py has their values and gradients against loops.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses import modality_loops
from tests.losses.family_data import B, D, data
from vlp.losses import build

TERMS = [
    ("gram", {}),
    ("gram", {"label_smoothing": 0.1}),
    ("symile", {}),
    ("symile", {"negatives": "n_squared"}),
]
READ = ("image", "text", "others", "others_valid", "scale")


def given(*absent: str) -> dict[str, Tensor]:
    values = data()
    return {name: values[name] for name in READ if name not in absent}


def value_and_gradients(objective: dict, d: dict[str, Tensor], **keywords) -> list[Tensor]:
    leaves = [value for value in d.values() if value.requires_grad]
    total, _ = build(objective, **keywords)(**d)
    return [total, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert expected[1].norm() > 1e-3, "the comparison must not be empty"


@pytest.mark.parametrize("negatives", ["n", "n_squared"])
def test_symile_of_two_modalities_is_infonce(negatives):
    pair = given("others", "others_valid")
    found = value_and_gradients({"symile": {"negatives": negatives}}, pair)
    assert_same(found, value_and_gradients({"infonce": {}}, pair))


def test_the_volume_of_two_rows_is_the_sine_between_them():
    pair = given("others", "others_valid")
    sines = (1 - (pair["text"] @ pair["image"].T).square()).sqrt()
    targets = torch.arange(B)
    z = -pair["scale"] * sines
    expected = (F.cross_entropy(z, targets) + F.cross_entropy(z.T, targets)) / 2
    leaves = list(pair.values())
    found = value_and_gradients({"gram": {}}, pair)

    # Off the sphere 1 is ‖t‖²·‖x‖²: only what is tangential is compared.
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-12)
    for leaf, ours, theirs in zip(leaves, found[1:], torch.autograd.grad(expected, leaves)):
        if leaf.dim():
            ours, theirs = (g - (g * leaf).sum(1, keepdim=True) * leaf for g in (ours, theirs))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)

    opposed = pair | {"text": -pair["text"]}
    assert build({"gram": {}})(**opposed)[0].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("name, options", [case for case in TERMS if case != ("symile", {})])
def test_samples_that_lack_a_modality_are_as_if_they_were_not_there(name, options):
    d = given()
    kept = torch.tensor(modality_loops.complete(d))
    assert 1 < len(kept) < B
    alone = {
        "image": d["image"][kept],
        "text": d["text"][kept],
        "others": d["others"][:, kept],
        "scale": d["scale"],
    }
    total, _ = build({name: {**options}})(**alone)
    expected = torch.autograd.grad(total, [d[k] for k in ("image", "text", "others", "scale")])

    with torch.no_grad():
        d["others"][~d["others_valid"]] = torch.nan
    found = value_and_gradients({name: options}, d)
    assert_same(found, [total, *expected])


@pytest.mark.parametrize("absent", ["one modality", "both"])
@pytest.mark.parametrize("name, options", TERMS)
def test_a_batch_without_a_complete_sample_gives_zero_and_says_so(name, options, absent):
    d = given()
    d["others_valid"] = torch.ones_like(d["others_valid"])
    d["others_valid"][1 if absent == "one modality" else slice(None)] = False
    objective = build({name: options})
    total, terms = objective(**d)
    leaves = [value for value in d.values() if value.requires_grad]

    assert total == 0 and terms[f"{name}.complete"] == 0
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    assert len(gradients) == 4 and not any(gradient.any() for gradient in gradients)

    d["others_valid"][:, : B // 4] = True
    assert objective(**d)[1][f"{name}.complete"] == 0.25


def test_a_single_sample_has_no_negatives():
    one = given("others_valid")
    one |= {name: one[name][..., :1, :] for name in ("image", "text", "others")}
    for name, options in TERMS:
        found = value_and_gradients({name: options}, one)
        assert all(not value.any() for value in found), name


def test_modalities_that_are_one_have_the_gradient_of_the_determinant():
    """No inverse exists of the Gram matrix of a column; volumes are those that ε allows."""
    d = given("others", "others_valid")
    d["others"] = d["image"].detach().unsqueeze(0).clone().requires_grad_()
    found = value_and_gradients({"gram": {}}, d)
    assert found[0].item() == pytest.approx(math.log(B), rel=1e-12)
    assert all(gradient.isfinite().all() for gradient in found)

    # Below an ε of nothing the volumes are numbers again, with the determinant's gradient.
    with torch.no_grad():
        d["others"] += 1e-3 * torch.randn(1, B, D, generator=torch.Generator().manual_seed(0))
        d["others"] /= d["others"].norm(dim=-1, keepdim=True)
    total = modality_loops.gram(0, 1e-12)(d)
    expected = [total, *torch.autograd.grad(total, list(d.values()))]
    found = value_and_gradients({"gram": {"epsilon": 1e-12}}, d)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_tuples_of_symile_are_drawn_anew_each_step():
    d = given()
    objective = build({"symile": {}})
    values = [objective(**d, step=step)[0].item() for step in (0, 1, 1)]
    assert values[0] != values[1] == values[2]
    expected = [modality_loops.symile(step=step)(d).item() for step in (0, 1)]
    assert values[:2] == pytest.approx(expected, rel=1e-12)


def test_nested_widths_cut_all_modalities():
    d = given()
    cut = {name: F.normalize(d[name][..., :4], dim=-1) for name in ("image", "text", "others")}
    nested = build({"matryoshka": {"widths": [4], "of": {"symile": {}}}})(**d)[0]
    assert nested.item() == pytest.approx(build({"symile": {}})(**d | cut)[0].item(), rel=1e-9)


@pytest.mark.parametrize(
    "change, name, options, message",
    [
        ({"others": 4}, "gram", {}, "found 6 modalities in a space of 5 dimensions.*at most 5"),
        ({"rows": 257}, "symile", {"negatives": "n_squared"}, "compares 257 candidates.*most 256"),
        ({"rows": 65, "others": 2}, "symile", {"negatives": "n_squared"}, "17,850,625 products"),
        ({}, "gram", {"epsilon": 0}, "expected a number > 0"),
        ({}, "gram", {"label_smoothing": 1}, "expected 0 <= ε < 1"),
        ({}, "symile", {"negatives": "n_square"}, "did you mean 'n_squared'"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, name, options, message):
    n_rows, n_others = change.get("rows", 4), change.get("others", 1)
    rows = F.normalize(torch.ones(n_others + 2, n_rows, D), dim=-1)
    with pytest.raises(ValueError, match=message):
        build({name: options})(image=rows[0], text=rows[1], others=rows[2:], scale=10.0)
