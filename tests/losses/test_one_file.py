"""What objectives of a file each equal in special cases, how they take masks, and what they refuse.

test_family.py has their values and gradients against loops.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses import loops
from tests.losses.family_data import B, data
from tests.losses.one_file_loops import cacr, decoupled_uniformity, kernel_mixture
from vlp.losses import build


def value_and_gradients(objective: dict, d: dict[str, Tensor]) -> list[Tensor]:
    leaves = [d["image"], d["text"], d["scale"]]
    total, _ = build(objective)(**d)
    return [total, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_same(first: dict, second: dict, d: dict[str, Tensor], **other: Tensor) -> None:
    found, expected = value_and_gradients(first, d), value_and_gradients(second, d | other)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert expected[1].norm() > 1e-3, "the comparison must not be empty"


def test_one_positive_is_attracted_as_by_alignment():
    assert_same({"cacr": {"beta": 0}}, {"alignment": {}}, data())


def test_a_square_kernel_is_infonce_at_twice_the_scale():
    d = data()
    mixture, d_at_twice = value_and_gradients({"kernel_mixture": {"mix": 0}}, d), dict(d)
    d_at_twice["scale"] = (2 * d["scale"].detach()).requires_grad_()
    plain = value_and_gradients({"infonce": {}}, d_at_twice)

    plain[-1] = 2 * plain[-1]  # of the scale itself
    torch.testing.assert_close(mixture, plain, rtol=1e-9, atol=1e-11)


def test_a_kernel_that_tells_all_samples_apart_changes_nothing():
    apart = torch.eye(B, dtype=torch.float64)
    assert_same(
        {"decoupled_uniformity": {"kernel": "image", "ridge": 1e-13}},
        {"decoupled_uniformity": {}},
        data() | {"teacher_image": apart},
    )


def test_centres_that_a_kernel_finds_alike_are_one():
    """Of one direction all smoothed centres are the same, and so is their spread: log e^0."""
    alike = F.normalize(torch.ones(B, 3, dtype=torch.float64), dim=1)
    value = build({"decoupled_uniformity": {"kernel": "text"}})(**data() | {"teacher_text": alike})
    assert value[0].item() == pytest.approx(0, abs=1e-12)


def test_several_teachers_give_the_mean_of_their_kernels():
    first, second = (F.normalize(torch.randn(B, 4).double(), dim=1) for _ in range(2))
    alike = (first @ first.T + second @ second.T) / 2
    d = data() | {"teacher_image": torch.stack([first, second], 1)}
    weights = torch.linalg.inv(alike + 0.01 * torch.eye(B, dtype=torch.float64)) @ alike
    centres = weights @ (d["image"] + d["text"]) / 2

    squares = torch.pdist(centres) ** 2
    value = build({"decoupled_uniformity": {"kernel": "image"}})(**d)[0]
    torch.testing.assert_close(value, (-2 * squares).exp().mean().log(), rtol=1e-9, atol=0)


def test_unmixed_rows_are_compared_as_in_infonce():
    d = data()
    found = value_and_gradients({"mixup": {"share": 0, "temperature": 0.2}}, d)
    expected = value_and_gradients(
        {"infonce": {}}, d | {"scale": torch.tensor(5.0).requires_grad_()}
    )
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_mixing_ends_where_the_run_says_so():
    """A third of nine steps; and by default never where the length is not known."""
    d, options = data(), {"mixup": {}}
    soft = build({"mixup": {"until": 0}}, steps=9)(**d)[0]
    is_soft = [bool(build(options, steps=9)(**d, step=step)[0] == soft) for step in range(9)]
    assert is_soft == 2 * [False] + 7 * [True], "int(.33 · 9) steps are mixed"
    assert build(options)(**d, step=8)[0] != soft
    assert build({"mixup": {"until": 1}}, steps=9)(**d, step=8)[0] != soft


def test_steps_and_modalities_mix_anew():
    d, objective = data(), build({"mixup": {"share": 1, "alpha": 1}})
    values = {objective(**d, step=step)[0].item() for step in (0, 0, 1, 2)}
    turned = objective(**d | {"image": d["text"], "text": d["image"]}, step=0)[0].item()
    assert len(values) == 3 and turned not in values


def test_an_extrapolated_pair_is_harder():
    d = data()
    plain = {"mixed_pairs": 0, "mixed_queries": 0}
    moved, stays = (
        build({"mixing": plain | options})(**d)[0] for options in ({"extrapolate": 2.0}, {})
    )
    assert moved > stays


def test_koleo_of_rows_that_are_equal_has_no_gradient_and_is_finite():
    rows = F.normalize(torch.randn(1, 6), dim=1).expand(4, -1).contiguous().requires_grad_()
    total, _ = build({"koleo": {}})(image=rows, text=rows.detach(), scale=1.0)
    (gradient,) = torch.autograd.grad(total, rows)
    assert total.item() == pytest.approx(-math.log(1e-8), rel=1e-6) and not gradient.any()


OVER_RANKS = [
    (
        ("kernel_mixture", {"ignore": {"same_label": True}}),
        kernel_mixture(0.5, labels=loops.LABELS),
    ),
    (("kernel_mixture", {"ignore": {"cluster": True}}), kernel_mixture(0.5, labels=loops.CLUSTERS)),
    (("cacr", {"ignore": {"same_label": True}}), cacr(labels=loops.LABELS)),
    (
        ("decoupled_uniformity", {"kernel": "text", "ridge": 0.3}),
        decoupled_uniformity(2, "text", 0.3),
    ),
]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_what_labels_and_teachers_say_of_candidates(n_ranks):
    loops.assert_equal(n_ranks, OVER_RANKS)


@pytest.mark.parametrize("name", ["cacr", "kernel_mixture"])
def test_without_a_candidate_there_is_nothing_to_push(name):
    alone = data() | {"label": torch.zeros(B, dtype=torch.int64)}
    total, _ = build(
        {
            name: {"beta": 1} if name == "cacr" else {},
        }
    )(**alone)
    masked, _ = build({name: {"ignore": {"same_label": True}}})(**alone)
    gradients = torch.autograd.grad(masked, [alone["image"], alone["text"]])

    expected = build({"alignment": {}})(**alone)[0].item() if name == "cacr" else 0
    assert masked.item() == pytest.approx(expected, abs=1e-12) and masked != total
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("koleo", {"epsilon": 0}, "expected a number > 0"),
        ("decoupled_uniformity", {"t": 0}, "expected numbers > 0"),
        ("decoupled_uniformity", {"kernel": "images"}, "did you mean 'image'"),
        ("cacr", {"negative_scale": -1}, "expected numbers >= 0"),
        ("cacr", {"ignore": {"queue": 0.5}}, "this term has no queue"),
        ("mixup", {"alpha": 0}, "expected numbers > 0"),
        ("mixup", {"share": 2}, "expected 0 to 1"),
        ("mixing", {"interpolate": -1}, "expected numbers >= 0"),
        ("kernel_mixture", {"mix": 1.5}, "expected 0 <= λ <= 1"),
        ("kernel_mixture", {"ignore": {"queue": 0.5}}, "this term has no queue"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


@pytest.mark.parametrize("name", ["koleo", "decoupled_uniformity", "cacr"])
def test_terms_over_other_rows_need_two(name):
    d = {key: value[:1] if value.dim() else value for key, value in data().items()}
    with pytest.raises(ValueError, match=f"'{name}' needs at least 2 candidates a row, found 1"):
        build({name: {}})(**d)
