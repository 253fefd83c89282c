"""What terms over patches and tokens equal in special cases, how they cut what they hold, and what
they refuse. test_family.py has their values and gradients against loops.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses import local_loops
from tests.losses.family_data import B, data, own_rows
from vlp.losses import _local_pairs, _places, build, filip

MASKS = ("image_tokens_valid", "text_tokens_valid", "negative_tokens_valid", "captions_valid")
LOCAL = [("fsc", {}), ("filip", {}), ("filip", {"scores": "apart"}), ("mil", {}), ("prior", {})]


def value_and_gradients(objective: dict, d: dict[str, Tensor], *leaves: str) -> list[Tensor]:
    total, _ = build(objective)(**d)
    return [total, *torch.autograd.grad(total, [d[name] for name in leaves])]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.squeeze(), b.squeeze(), rtol=1e-9, atol=1e-11)
    assert max(value.norm() for value in second[1:]) > 1e-3, "the comparison must not be empty"


def one_place(d: dict[str, Tensor]) -> dict[str, Tensor]:
    """A patch a picture and a token a text, all of which take part."""
    cut = {
        "image_tokens": d["image_tokens"][:, :1],
        "text_tokens": d["text_tokens"][:, :1],
        "negative_tokens": d["negative_tokens"][:, :, :1],
        "captions": d["captions"][:, :1],
    }
    leaves = {name: value.detach().requires_grad_() for name, value in cut.items()}
    masks = {f"{name}_valid": torch.ones_like(value[..., 0] > 0) for name, value in leaves.items()}
    return d | leaves | masks


@pytest.mark.parametrize("name, options", LOCAL[1:-1])
def test_one_place_a_side_is_infonce(name, options):
    d = one_place(data())
    text = "captions" if name == "mil" else "text_tokens"
    rows = {"image": d["image_tokens"][:, 0], "text": d[text][:, 0], "scale": d["scale"]}
    rows = {key: value.detach().requires_grad_() for key, value in rows.items()}
    assert_same(
        value_and_gradients({name: options}, d, "image_tokens", text, "scale"),
        value_and_gradients({"infonce": {}}, rows, "image", "text", "scale"),
    )


def test_one_place_a_side_is_the_own_sample_form():
    d = one_place(data())
    rows = d | {
        "image": d["image_tokens"][:, 0].detach().requires_grad_(),
        "text": d["text_tokens"][:, 0].detach().requires_grad_(),
        "negatives": d["negative_tokens"][:, :, 0].detach().requires_grad_(),
    }
    options = {"focal": 2, "smoothing": 0.02}
    local = ("image_tokens", "text_tokens", "negative_tokens", "scale")
    whole = ("image", "text", "negatives", "scale")
    found = value_and_gradients({"fsc": options}, d, *local)
    expected = value_and_gradients({"hard_negatives": options | {"form": "own"}}, rows, *whole)

    # What a token sees is made a unit row once more: along it there is no gradient.
    image = rows["image"].detach()
    along = (expected[1] * image).sum(1, keepdim=True) * image
    assert_same(found, [expected[0], expected[1] - along, *expected[2:]])


def test_a_large_gamma_takes_the_best_patch():
    d = data()
    best = one_place(d) | {"captions": d["captions"][:, :1], "image_tokens": d["image_tokens"]}
    best |= {
        "image_tokens_valid": d["image_tokens_valid"] | ~d["image_tokens_valid"].any(1)[:, None]
    }
    similarities = torch.einsum("ipd,jd->ijp", best["image_tokens"], best["captions"][:, 0])
    masked = similarities.masked_fill(~best["image_tokens_valid"][:, None], -torch.inf)
    z = d["scale"] * masked.amax(-1)
    expected = (z.logsumexp(1) + z.logsumexp(0) - 2 * z.diagonal()).mean() / 2
    found = build({"mil": {"gamma": 1e4}})(**best)[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-3)
    assert abs(build({"mil": {"gamma": 1}})(**best)[0] - expected) > 1e-2


KEPT = [
    (("filip", {"keep": 0.5}), local_loops.filip(keep=0.5)),
    (("filip", {"keep": 0.25, "scores": "apart"}), local_loops.filip(True, keep=0.25)),
]


def test_the_best_quarter_and_half_of_the_places_remain():
    leaves, n_cases = ("image_tokens", "text_tokens", "scale"), 0
    for (name, options), loop in KEPT:
        d = data()
        expected = loop(d)
        gradients = torch.autograd.grad(expected, [d[leaf] for leaf in leaves])
        assert_same(value_and_gradients({name: options}, d, *leaves), [expected, *gradients])
        n_cases += 1
    assert n_cases == 2


def test_a_text_of_one_sentence_has_none_to_be_told_from():
    d = data()
    valid = torch.zeros_like(d["captions_valid"])
    valid[:, 1] = True
    total, _ = build({"prior": {"patch_weight": 2}})(**d | {"captions_valid": valid})
    assert total.item() == pytest.approx(2 * d["patch_distances"].mean().item())
    alone = {key: value for key, value in d.items() if key != "region_scale"}
    scale = {"region_scale": d["scale"]}
    assert build({"prior": {}})(**alone)[0] == build({"prior": {}})(**alone | scale)[0]


@pytest.mark.parametrize("name, options", LOCAL[:-1])
def test_without_a_mask_all_patches_take_part(name, options):
    d = data()
    everything = d | {"image_tokens_valid": torch.ones_like(d["image_tokens_valid"])}
    without = {key: value for key, value in d.items() if key != "image_tokens_valid"}
    values = [build({name: options})(**one)[0] for one in (everything, without, d)]
    assert values[0] == values[1] and values[0] != values[2]


@pytest.mark.parametrize("name, options", LOCAL)
def test_what_takes_no_part_has_no_influence(name, options):
    """Be it NaN, and where no sample takes part the loss is 0."""
    d = data()
    leaves = [d[key] for key in ("image_tokens", "text_tokens", "negative_tokens", "captions")]
    before = torch.autograd.grad(build({name: options})(**d)[0], leaves, materialize_grads=True)
    with torch.no_grad():
        for mask in MASKS:
            d[mask.removesuffix("_valid")][~d[mask]] = torch.nan
    total, _ = build({name: options})(**d)
    after = torch.autograd.grad(total, leaves, materialize_grads=True)
    assert total.isfinite() and all(torch.equal(a, b) for a, b in zip(before, after))

    nobody = d | {mask: torch.zeros_like(d[mask]) for mask in MASKS}
    total, _ = build({name: options})(**nobody)
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    assert total == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name, options", LOCAL[:-1])
def test_places_change_nothing(name, options, monkeypatch):
    def found() -> list[Tensor]:
        d = data()
        leaves = [d[key] for key in ("image_tokens", "text_tokens", "negative_tokens", "captions")]
        total, _ = build({name: options})(**d)
        return [total, *torch.autograd.grad(total, leaves, materialize_grads=True)]

    whole = found()
    calls = []
    plain = _places.recomputed

    def counted(*arguments):
        calls.append(arguments)
        return plain(*arguments)

    for module in (_places, _local_pairs):
        monkeypatch.setattr(module, "recomputed", counted)
        monkeypatch.setattr(module, "NUMBERS", 80)
    monkeypatch.setattr(filip, "NUMBERS", 80)
    assert_same(found(), whole)
    assert len(calls) >= 4


def test_patches_that_are_all_alike_weigh_the_same():
    d = data()
    with torch.no_grad():
        d["image_tokens"].copy_(d["image_tokens"][:, :1].expand_as(d["image_tokens"]))
    alike = one_place(d) | {name: d[name] for name in ("image_tokens", "image_tokens_valid")}
    leaves = ("image_tokens", "text_tokens", "negative_tokens")
    for attention in ("minmax", "softmax"):
        found = value_and_gradients({"fsc": {"attention": attention}}, alike, *leaves)
        assert all(value.isfinite().all() for value in found)


def of_ranks() -> list[list[float]]:
    d = own_rows(data())
    plans = [({}, {"candidates": "rank"}), ({"topology": {"group": 1}}, {})]
    return [
        [build({name: options}, **plan)(**d)[0].item() for name in ("filip", "mil")]
        for plan, options in plans
    ]


def test_the_candidates_of_a_rank_are_a_group_of_one():
    whole, halves = data(), []
    for rows in (slice(0, B // 2), slice(B // 2, B)):
        half = {key: value[rows] if local(key) else value for key, value in whole.items()}
        halves.append([build({name: {}})(**half)[0].item() for name in ("filip", "mil")])

    by_rank = ranks.run(2, of_ranks)
    for by_option, by_topology in by_rank:
        assert by_option == pytest.approx(by_topology, rel=1e-12)

    # Samples that take part are not as many on both: the mean is over all of them.
    takes_part = whole["image_tokens_valid"].any(1) & whole["text_tokens_valid"].any(1)
    n_live = torch.stack([takes_part[: B // 2].sum(), takes_part[B // 2 :].sum()])
    means = sum(n * half[0] for n, half in zip(n_live.tolist(), halves)) / n_live.sum().item()
    found = sum(rank[0][0] for rank in by_rank) / 2
    assert found == pytest.approx(means, rel=1e-9) and halves[0] != halves[1]


def local(name: str) -> bool:
    return name in {"image", "text", "captions", *MASKS} or name.endswith("_tokens")


def test_a_padded_token_s_neighbours_are_others_of_the_text():
    """Padding is not the best match of a patch, however near it is."""
    d = data()
    with torch.no_grad():
        near = F.normalize(d["image_tokens"].mean(1, keepdim=True), dim=-1)
        padded = torch.cat([d["text_tokens"], near.detach()], 1)
    mask = torch.cat([d["text_tokens_valid"], torch.zeros(B, 1, dtype=torch.bool)], 1)
    longer = d | {"text_tokens": padded, "text_tokens_valid": mask}
    objective = {"filip": {}}
    assert build(objective)(**longer)[0].item() == pytest.approx(build(objective)(**d)[0].item())


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("fsc", {"focal": -1}, "expected focal >= 0"),
        ("fsc", {"attention": "soft"}, "did you mean 'softmax'"),
        ("filip", {"keep": 0}, "expected 0 < share <= 1"),
        ("filip", {"candidates": "ranks"}, "did you mean 'rank'"),
        ("mil", {"gamma": 0}, "expected γ > 0"),
        ("prior", {"patch_weight": -1}, "expected a number >= 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})
