"""What objectives over several views equal in special cases, how they take masks, and what they
refuse. test_family.py has their values and gradients against loops.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.losses import loops
from tests.losses.family_data import B, data
from tests.losses.view_loops import mv_dhel, mv_infonce, poly_view, sinkhorn
from vlp import dist
from vlp.losses import build, min_views
from vlp.losses.swap import _sinkhorn
from vlp.pairwise import Backend, Pairs, Topology, number
from vlp.plugin import keyed

PAIR = ("image", "text", "scale")


def pair() -> dict[str, Tensor]:
    """Image and text without further views."""
    return {name: value for name, value in data().items() if name in PAIR}


def value_and_gradients(objective: dict, d: dict[str, Tensor]) -> list[Tensor]:
    leaves = [value for value in d.values() if value.requires_grad]
    total, _ = build(objective)(**{"scale": torch.tensor(1.0)} | d)
    return [total, *torch.autograd.grad(total, leaves, materialize_grads=True)]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert max(value.norm() for value in second[1:]) > 1e-3, "the comparison must not be empty"


@pytest.mark.parametrize("form", ["geometric", "arithmetic"])
def test_two_views_are_compared_as_simclr_does(form):
    of_pair = {"poly_view": {"form": form}}
    assert_same(
        value_and_gradients(of_pair, pair()),
        value_and_gradients({"infonce": {"within": "both"}}, pair()),
    )

    d = data()
    views = {name: d[name] for name in ("image", "text", "image_views")}
    views |= {"scale": torch.tensor(10.0)}
    of_views = {"poly_view": {"form": form, "views": "image"}}
    assert_same(value_and_gradients(of_views, views), value_and_gradients({"slip": {}}, views))


def test_two_views_without_negatives_of_their_own_kind():
    """MV-InfoNCE of a pair is −log [2 e^{z_ii} / (Σ_j e^{z_ij} + Σ_j e^{z_ji})]."""
    d = pair()
    z = d["scale"] * d["image"] @ d["text"].T
    total = torch.logaddexp(z.logsumexp(1), z.logsumexp(0))
    expected = (total - z.diagonal() - math.log(2)).mean()

    gradients = torch.autograd.grad(expected, list(d.values()))
    assert_same(value_and_gradients({"mv_infonce": {}}, d), [expected.detach(), *gradients])


def test_arithmetic_is_at_most_geometric():
    """−log of a mean lies below the mean of −log, and they are one where all views agree."""
    geometric, arithmetic = (
        build({"poly_view": {"form": form}})(**data())[0] for form in ("geometric", "arithmetic")
    )
    assert arithmetic < geometric


def test_a_sure_arithmetic_loss_keeps_its_gradient_in_float32():
    rows = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0][:4]
    noise = 0.05 * torch.randn(4, 4, 16, dtype=torch.float64)
    views = F.normalize(rows + noise, dim=-1)
    found = []
    for dtype in (torch.float64, torch.float32):
        u = views.to(torch.float32).to(dtype).requires_grad_()
        d = {"image": u[0], "text": u[1], "image_views": u[2:3], "text_views": u[3:]}
        total, _ = build({"poly_view": {"form": "arithmetic"}})(**d, scale=torch.tensor(20.0))
        found.append((total.item(), torch.autograd.grad(total, u)[0].double()))

    (wide, wide_gradient), (narrow, gradient) = found
    assert 1e-9 < wide < 1e-6 and narrow == pytest.approx(wide, rel=1e-4)
    assert (gradient - wide_gradient).norm() < 1e-4 * wide_gradient.norm()


def test_many_views_do_not_overflow():
    """Sums over six views at a scale of 100 would leave float32's range if they were multiplied."""
    views = F.normalize(torch.randn(6, 8, 6), dim=-1).requires_grad_()
    d = {"image": views[0], "text": views[1], "image_views": views[2:4], "text_views": views[4:]}
    total, _ = build({"mv_dhel": {}})(**d, scale=torch.tensor(100.0))
    assert total.isfinite() and torch.autograd.grad(total, views)[0].isfinite().all()


def test_a_prediction_that_is_right_loses_nothing_and_its_target_does_not_move():
    d = data()
    right = d | {"predicted_text": d["text"].detach(), "predicted_image": d["image"].detach()}
    assert build({"siam": {}})(**right)[0] == 0
    total, _ = build({"siam": {}})(**d)
    moved = torch.autograd.grad(total, [d["image"], d["text"]], materialize_grads=True)
    assert total > 0 and not any(gradient.any() for gradient in moved)


def test_features_that_agree_and_repeat_nothing_lose_nothing():
    """C = I: rows of ±1 whose columns are orthogonal, of mean 0 and variance 1."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    rows = F.normalize(signs, dim=1)
    assert build({"barlow": {}})(image=rows, text=rows, scale=1.0)[0].item() < 1e-20
    turned = build({"barlow": {}})(image=rows, text=rows.flip(1), scale=1.0)[0].item()
    assert turned == pytest.approx(2 + 5e-3 * 2), "each feature agrees with the other one"


def test_assignments_are_scaled_as_by_division():
    """Rows sum to 1, and after many iterations columns are equal."""
    d = data()
    image, text = (d[name][0].detach() for name in ("image_views", "text_views"))
    pairs = Pairs.at(Backend(dist.world(), Topology.read("global"), "tiled"), 0)
    for iterations in (1, 3, 200):
        f, g = _sinkhorn(image, text, number(1 / 0.3, image), pairs, iterations)
        q = (image @ text.T / 0.3 + f.unsqueeze(1) + g).exp()
        torch.testing.assert_close(q, sinkhorn(image @ text.T, 0.3, iterations))
        torch.testing.assert_close(q.sum(1), torch.ones(B, dtype=torch.float64))
    torch.testing.assert_close(q.sum(0), torch.ones(B, dtype=torch.float64))


def test_assignments_of_a_small_epsilon_do_not_overflow():
    d = {name: value.float() for name, value in data().items() if "views" in name}
    rows = {name: data()[name].float() for name in ("image", "text")}
    total, _ = build({"swap": {"epsilon": 1e-3}})(**d, **rows, scale=100.0)
    assert total.isfinite()


OVER_RANKS = [
    (("mv_infonce", {"ignore": {"same_label": True}}), mv_infonce(labels=loops.LABELS)),
    (("mv_dhel", {"ignore": {"same_label": True}}), mv_dhel(labels=loops.LABELS)),
    (
        ("poly_view", {"ignore": {"same_label": True}, "views": "image"}),
        poly_view("geometric", "image", labels=loops.LABELS),
    ),
]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_samples_of_one_label_are_no_negatives(n_ranks):
    loops.assert_equal(n_ranks, OVER_RANKS)


@pytest.mark.parametrize("name", ["mv_infonce", "mv_dhel", "poly_view"])
def test_without_negatives_nothing_is_pushed(name):
    d = data() | {"label": torch.zeros(B, dtype=torch.int64)}
    total, _ = build({name: {"ignore": {"same_label": True}}})(**d)
    gradients = torch.autograd.grad(total, [d["image"], d["text_views"]])
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    if name != "mv_dhel":  # whose attraction stays
        assert total.item() == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["mv_infonce", "mv_dhel", "poly_view"])
def test_fewer_than_two_views_are_refused(name):
    d = data()
    with pytest.raises(ValueError, match="found 1 view of a sample, expected at least 2"):
        build({name: {"views": "image"}})(**d | {"image_views": d["image_views"][:1]})
    (term,) = keyed("vlp.losses", {name: {"views": "image"}})
    (of_all,) = keyed("vlp.losses", {name: {}})
    assert min_views(term) == 2 and min_views(of_all) == 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mv_infonce", {"ignore": {"margin": 0.1}}, "none is the row's own"),
        ("poly_view", {"form": "harmonic"}, "form"),
        ("mv_dhel", {"views": "texts"}, "did you mean 'text'"),
        ("siam", {"target": "average"}, "target"),
        ("barlow", {"off_diagonal": -1}, "expected a number >= 0"),
        ("swap", {"epsilon": 0}, "expected a number > 0"),
        ("swap", {"iterations": 0}, "at least 1"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


@pytest.mark.parametrize("name", ["mv_dhel", "barlow"])
def test_terms_over_other_rows_need_two(name):
    d = {key: value[:1] if value.dim() else value for key, value in pair().items()}
    with pytest.raises(ValueError, match=f"'{name}' needs at least 2 candidates a row, found 1"):
        build({name: {}})(**d)
