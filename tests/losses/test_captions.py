"""Several captions a sample: what the term `captions` equals in special cases, what has no
influence on it, groups of ranks, and what is refused. (The loops: tests/losses/captions_loops.py.)
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from vlp import dist
from vlp.checks import check_roles
from vlp.config.reading import parse
from vlp.losses import build

B, K, D = 8, 3, 6
FORMS = ({}, {"form": "decoupled"})
# Every option in turn, the short column being the last.
OPTIONS = (*FORMS, {"label_smoothing": 0.1, "short": {"components": 3}})


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return F.normalize(values, dim=-1).requires_grad_()


def call(options: dict, image: Tensor, captions: Tensor, valid: Tensor, **build_options) -> Tensor:
    objective = build({"captions": options}, **build_options)
    text = image.detach().flip(0)  # which the term does not read
    total, _ = objective(image=image, text=text, scale=7.0, captions=captions, captions_valid=valid)
    return total


def infonce(image: Tensor, text: Tensor, **options) -> Tensor:
    return build({"infonce": options})(image=image, text=text, scale=7.0)[0]


def everything(shape: tuple[int, ...] = (B, K)) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def assert_equal(found: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Values and the gradients of the leaves, and that these are not empty."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(total, leaves) for total in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert all(gradient.norm() > 1e-6 for gradient in gradients[0])


# Equals


@pytest.mark.parametrize("options", FORMS)
def test_one_caption_a_sample_is_infonce(options):
    image, captions = rows(B, D), rows(B, 1, D, seed=1)
    found = call(options, image, captions, everything((B, 1)))
    assert_equal(found, infonce(image, captions[:, 0]), image, captions)


def test_copies_of_one_caption_are_infonce():
    image, caption = rows(B, D), rows(B, 1, D, seed=1)
    found = call({}, image, caption.expand(B, K, D), everything())
    assert_equal(found, infonce(image, caption[:, 0]), image, caption)


@pytest.mark.parametrize("options", FORMS)
def test_one_valid_column_is_infonce_of_it(options):
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    valid = torch.arange(K).expand(B, K) == 1
    found = call(options, image, captions, valid)
    assert_equal(found, infonce(image, captions[:, 1]), image, captions)


def test_the_order_of_a_sample_s_captions_does_not_matter_where_they_compete_at_once():
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    valid = torch.rand(B, K, generator=torch.Generator().manual_seed(2)) < 0.6
    order = torch.argsort(torch.rand(B, K, generator=torch.Generator().manual_seed(3)), 1)
    shuffled = captions.gather(1, order.unsqueeze(-1).expand(-1, -1, D))
    options = {"form": "decoupled"}
    found = call(options, image, shuffled, valid.gather(1, order))
    assert_equal(found, call(options, image, captions, valid), image, captions)


@pytest.mark.parametrize("options", FORMS)
def test_the_order_of_columns_does_not_matter(options):
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    valid = torch.rand(B, K, generator=torch.Generator().manual_seed(2)) < 0.6
    found = call(options, image, captions.flip(1), valid.flip(1))
    assert_equal(found, call(options, image, captions, valid), image, captions)


def test_all_components_are_the_plain_term():
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    found = call({"short": {"components": D}}, image, captions, everything())
    assert_equal(found, call({}, image, captions, everything()), image, captions)


def test_long_clip_is_the_plain_pair_and_the_short_one():
    """L(x, t_long) + L(PCA(x), t_short), as its recipe writes it."""
    image, long, short = rows(B, D), rows(B, D, seed=1), rows(B, 1, D, seed=2)
    smoothed = {"label_smoothing": 0.1}
    objective = build({"infonce": smoothed, "captions": {**smoothed, "short": {"components": 3}}})
    found, _ = objective(
        image=image,
        text=long,
        scale=7.0,
        captions=short,
        captions_valid=everything((B, 1)),
    )

    centred = (image - image.mean(0)).detach()
    basis = torch.linalg.svd(centred)[2][:3]
    mean = image.detach().mean(0)
    cut = (image - mean) @ basis.T @ basis + mean
    scores = 7.0 * cut @ short[:, 0].T
    target = torch.arange(B)
    of_short = [F.cross_entropy(z, target, label_smoothing=0.1) for z in (scores, scores.T)]
    assert_equal(found, infonce(image, long, **smoothed) + sum(of_short) / 2, image, long, short)


# No influence


@pytest.mark.parametrize("options", OPTIONS)
def test_what_takes_no_part_has_no_influence_be_it_nan(options):
    image = rows(B, D)
    valid = torch.rand(B, K, generator=torch.Generator().manual_seed(2)) < 0.6
    valid[3] = False  # a sample without any caption: its image is no candidate either
    n_checked = 0
    results = []
    for wrong in (1.0, torch.nan):
        captions = rows(B, K, D, seed=1).detach()
        captions[~valid] *= wrong
        captions.requires_grad_()
        total = call(options, image, captions, valid)
        of_image, of_captions = torch.autograd.grad(total, [image, captions])
        assert not of_captions[~valid].any() and not of_image[3].any()
        n_checked += int((~valid).sum())
        results.append((total, of_image))
    assert n_checked > 10
    torch.testing.assert_close(*results, rtol=0, atol=0)

    moved = image.detach().clone()
    moved[3] = -moved[3]
    again = call(options, moved.requires_grad_(), rows(B, K, D, seed=1), valid)
    torch.testing.assert_close(again, results[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
def test_without_any_valid_caption_the_term_is_zero_with_zero_gradient(options):
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    total = call(options, image, captions, ~everything())
    assert total == 0
    assert not any(g.any() for g in torch.autograd.grad(total, [image, captions]))


def test_a_column_with_one_sample_does_not_count():
    image, captions = rows(B, D), rows(B, K, D, seed=1)
    valid = everything()
    valid[1:, 2] = False
    found = call({}, image, captions, valid)
    assert_equal(found, call({}, image, captions[:, :2], valid[:, :2]), image, captions)


# Ranks that share candidates in groups


def in_groups() -> list[list]:
    """The term of this rank's two samples, in groups of two of four ranks, with its gradients."""
    first = 2 * dist.rank()
    results = []
    for options in OPTIONS:
        for exchange in ("gather", "ring"):
            image, captions = rows(B, D), rows(B, K, D, seed=1)
            own = slice(first, first + 2)
            topology = {"group": 2, "exchange": exchange}
            total = call(options, image[own], captions[own], uneven()[own], topology=topology)
            gradients = torch.autograd.grad(total, [image, captions], materialize_grads=True)
            results.append([total.item(), *(g.tolist() for g in gradients)])
    return results


def uneven() -> Tensor:
    """Two samples of the second group have captions in the last column, of the first only one."""
    valid = everything()
    valid[[0, 1, 2, 4, 5], 2] = False
    valid[6, :2] = False
    return valid


def test_groups_of_ranks_are_problems_of_their_own_with_one_common_mean():
    """Columns count where some group has two samples in them; means divide by all ranks' counts."""
    results = ranks.run(4, in_groups)
    n_checked = 0
    for o, options in enumerate(OPTIONS):
        image, captions = rows(B, D), rows(B, K, D, seed=1)
        expected = grouped(options, image, captions, uneven())
        gradients = torch.autograd.grad(expected, [image, captions])
        for e in range(2):
            of_ranks = [result[2 * o + e] for result in results]
            for i, wanted in enumerate((expected, *gradients)):
                parts = [torch.tensor(one[i], dtype=torch.float64) for one in of_ranks]
                mean = sum(parts) / 4
                torch.testing.assert_close(mean, wanted, rtol=1e-10, atol=1e-12)
                n_checked += 1
    assert n_checked == 3 * len(OPTIONS) * 2


def grouped(options: dict, image: Tensor, captions: Tensor, valid: Tensor) -> Tensor:
    """From the terms of each group alone: their means, weighted by the samples that take part."""
    groups = (slice(0, 4), slice(4, 8))
    if options.get("form") == "decoupled":
        sums = [
            valid[g].any(1).sum() * call(options, image[g], captions[g], valid[g]) for g in groups
        ]
        return sum(sums) / valid.any(1).sum()

    total = 0
    for k in range(K):
        one = {name: value for name, value in options.items() if name != "short" or k == K - 1}
        n_samples, of_column = 0, 0
        for g in groups:
            n_valid = int(valid[g, k].sum())
            if n_valid < 2:
                continue
            column = call(one, image[g], captions[g, k : k + 1], valid[g, k : k + 1])
            of_column, n_samples = of_column + n_valid * column, n_samples + n_valid
        total = total + of_column / n_samples
    return total / K


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "all"}, "'all' is not a choice"),
        ({"form": "decoupled", "label_smoothing": 0.1}, "belong to form: mean, not decoupled"),
        ({"form": "decoupled", "short": {}}, "belong to form: mean, not decoupled"),
        ({"label_smoothing": 1.0}, "expected 0 <= ε < 1"),
        ({"weights": {"long": -1.0}}, "expected numbers >= 0, one of them above 0"),
        ({"weights": {"long": 0.0, "short": 0.0}}, "expected numbers >= 0, one of them above 0"),
        ({"short": {"components": 0}}, "components: found 0, expected at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build({"captions": options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"weights": {"long": 1.0, "short": 1.0}},
            "weights are of long, short, and samples have 3",
        ),
        ({"short": {"column": 3}}, r"short\.column: found 3, expected one of 3 columns"),
        (
            {"short": {"components": 5}},
            r"short\.components: found 5 of 4 candidates, expected fewer",
        ),
    ],
)
def test_options_that_do_not_fit_the_batch_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"the term 'captions': {message}"):
        call(options, rows(4, D), rows(4, K, D), everything((4, K)))


@pytest.mark.parametrize("roles", [["short", "long"], ["long"], []])
def test_weights_of_other_roles_than_the_data_s_are_refused_at_the_start(roles):
    captions = {"choose": "all", "roles": roles} if roles else {}
    run = {
        "out": "unused",
        "data": {"sources": [{"name": "shards", "path": "unused"}], "captions": captions},
        "model": {"image_tower": {"name": "open_clip", "architecture": "RN50"}},
        "train": {"duration": 1, "batch": 8},
        "objective": {"captions": {"weights": {"long": 1, "short": 2}}},
    }
    config = parse(run)
    with pytest.raises(ValueError, match=r"has weights for long, short, and data\.captions\.roles"):
        check_roles(build(config.objective), config)
    run["data"]["captions"] = {"choose": "all", "roles": ["long", "short"]}
    check_roles(build(config.objective), parse(run))
