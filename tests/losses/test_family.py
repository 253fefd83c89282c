"""Every objective against a loop written from its equation, in float64, on 1, 2 and 4 ranks,
gathered and on a ring.

The ranks hold different numbers of valid captions, counting samples, tokens and concepts; values
and the gradients of all inputs are compared, through `vlp.losses.build`. (Objectives with a state
for each sample: test_moving.py.)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from tests.losses import (
    captions_loops,
    distill_loops,
    local_loops,
    modality_loops,
    one_file_loops,
    view_loops,
)
from tests.losses.family_data import (
    CANDIDATES,
    LEAVES,
    PLANS,
    B,
    D,
    K,
    data,
    gradients_of,
    own_rows,
)
from tests.losses.family_loops import (
    alignment,
    both,
    captioning,
    concepts,
    counting,
    cross_uniformity,
    cwcl,
    cyclip,
    decoupled,
    decoupled_weighted,
    distance,
    distill,
    hn_nce,
    infonce,
    macl,
    mann_whitney,
    matryoshka,
    mc_infonce,
    mixing,
    momentum_queue,
    multi_view,
    others,
    queue_infonce,
    ranked,
    ranking,
    self_distillation,
    siglip,
    slip,
    uniformity,
    z,
)
from tests.losses.hard_negatives_loops import (
    intra,
    mmclip_images,
    negclip,
    negclip_images,
    negclip_of_images,
    own,
    own_images,
    rank,
    sigmoid,
    text_grounded,
    triplet,
)
from vlp.losses import build

NOTHING = {"mixed_pairs": 0, "mixed_queries": 0}
MIXED = {"hardest": 4, "mixed_pairs": 3, "mixed_queries": 2}
NESTED = {
    "widths": [2, D],
    "weights": [0.5, 2],
    "of": {"infonce": {}, "uniformity": {"weight": 0.5}},
}
HARD = {"widths": [D, 1, 3], "of": {"hard_negatives": {"form": "negclip"}}}
QUEUED = {"widths": [3], "of": {"momentum_queue": {}}}
FAMILY = [
    ("infonce", {}, both(infonce)),
    ("siglip", {}, siglip),
    ("uniformity", {}, uniformity),
    ("cross_uniformity", {}, cross_uniformity),
    ("alignment", {}, alignment),
    ("decoupled", {}, both(decoupled)),
    ("decoupled", {"weighted": True}, both(decoupled_weighted)),
    ("hn_nce", {"alpha": 1, "beta": 0.25}, both(hn_nce(1, 0.25))),
    ("hn_nce", {"alpha": 0.5, "beta": 1.5}, both(hn_nce(0.5, 1.5))),
    ("hn_nce", {"alpha": 0, "beta": 0}, both(decoupled)),
    ("hn_nce", {"alpha": 1, "beta": 0}, both(infonce)),
    ("counting", {}, counting(False, 1)),
    ("counting", {"logits": "scaled"}, counting(True, 1)),
    ("counting", {"counterfactuals": "all"}, counting(False, None)),
    ("counting", {"logits": "scaled", "counterfactuals": "all"}, counting(True, None)),
    ("macl", {}, macl),
    ("cyclip", {}, cyclip),
    ("cwcl", {}, cwcl("image", 1)),
    ("cwcl", {"frozen": "text", "sharpening": 4}, cwcl("text", 4)),
    ("distill", {}, distill),
    ("distill", {"form": "ranking"}, ranking),
    ("distill", {"form": "concepts"}, concepts),
    *distill_loops.CASES,
    ("captioning", {}, captioning),
    ("ranked", {}, ranked(1, False)),
    ("ranked", {"power": 2, "normalize": True}, ranked(2, True)),
    ("ranked", {"power": 0}, both(infonce)),
    ("mann_whitney", {"tau": 0.1}, mann_whitney(0.1)),
    ("mann_whitney", {}, mann_whitney(0.01)),
    ("mc_infonce", {"samples": 3}, mc_infonce(3)),
    ("momentum_queue", {}, momentum_queue),
    ("mixing", MIXED, mixing(MIXED)),
    ("mixing", MIXED | {"in_batch": False}, mixing(MIXED | {"in_batch": False})),
    ("mixing", NOTHING, queue_infonce),
    ("multi_view", {}, multi_view),
    ("slip", {}, slip),
    ("matryoshka", NESTED, matryoshka(NESTED, (both(infonce), 1), (uniformity, 0.5))),
    ("matryoshka", {"of": {"siglip": {}}}, matryoshka({"widths": [D]}, (siglip, 1))),
    ("matryoshka", HARD, matryoshka(HARD, (negclip, 1))),
    ("matryoshka", QUEUED, matryoshka(QUEUED, (momentum_queue, 1))),
    ("self_distillation", {}, self_distillation(False)),
    ("self_distillation", {"negatives": True}, self_distillation(True)),
    ("hard_negatives", {"form": "negclip"}, negclip),
    ("hard_negatives", {"form": "negclip", "image_weight": 1}, negclip_of_images),
    ("hard_negatives", {"form": "triplet"}, triplet),
    ("hard_negatives", {"form": "own"}, own(0, 0)),
    ("hard_negatives", {"form": "own", "focal": 2, "smoothing": 0.02}, own(2, 0.02)),
    ("hard_negatives", {"form": "text"}, text_grounded),
    ("hard_negatives", {"form": "rank"}, rank([0, 0, 0])),
    ("hard_negatives", {"form": "intra"}, intra),
    *captions_loops.CASES,
    *one_file_loops.CASES,
    *view_loops.CASES,
    *local_loops.CASES,
    *modality_loops.CASES,
    ("hard_negatives", {"form": "sigmoid"}, sigmoid),
    ("hard_negatives", {"form": "sigmoid", "negatives": "images"}, mmclip_images),
    ("hard_negatives", {"form": "own", "negatives": "images"}, own_images),
    ("hard_negatives", {"form": "negclip", "negatives": "images"}, negclip_images),
]
N_LIVE = 347  # inputs that have a gradient, over all cases
# All ways to compute are met on four ranks, and each of their parts on fewer: a ring of one rank
# sends nothing.
WAYS = {
    1: [("dense", "global"), ("tiled", "global")],
    2: [("dense", "global"), ("tiled", "ring")],
    4: PLANS,
}


def on_rank(plans: list[tuple[str, str]]) -> list[list]:
    results = []
    for impl, topology in plans:
        results.append([])
        for name, options, _ in FAMILY:
            d = data()
            objective = build({name: options}, impl=impl, topology=topology)
            objective.backend = replace(objective.backend, tile_size=3)
            results[-1].append(gradients_of(objective(**own_rows(d))[0], d))

    return results


@pytest.mark.parametrize("n_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_objectives_equal_loops(n_ranks):
    expected = [gradients_of(loop(d), d) for _, _, loop in FAMILY for d in [data()]]
    plans = WAYS[n_ranks]
    found = ranks.run(n_ranks, on_rank, plans)

    n_cases = n_live = 0
    for p, plan in enumerate(plans):
        for f, (name, options, _) in enumerate(FAMILY):
            for i, leaf in enumerate(("value", *LEAVES)):
                mean = (
                    sum(
                        torch.tensor(found[k][p][f][i], dtype=torch.float64) for k in range(n_ranks)
                    )
                    / n_ranks
                )
                wanted = torch.tensor(expected[f][i], dtype=torch.float64)
                error = (mean - wanted).norm()
                assert error <= 1e-10 * wanted.norm() + 1e-12, (
                    f"{name} {options}, {plan}, {leaf}: {mean} is not {wanted}"
                )
                n_live += i > 0 and bool(wanted.norm() > 1e-6)
            n_cases += 1

    n_plans = len(plans)
    assert n_cases == n_plans * len(FAMILY) == n_plans * 111, "every case must be met"
    assert n_live == n_plans * N_LIVE, "the comparison must not be empty"


def test_half_precision_embeddings():
    """bfloat16 inputs against the loops on the same rounded values, at a scale of 20."""
    exact = data()
    with torch.no_grad():
        for value in exact.values():
            if value.is_floating_point() and value.dim():
                value.copy_(value.bfloat16())
        exact["scale"].fill_(20)

    n = 0
    for name, options, loop in FAMILY:
        given = {
            k: v.bfloat16() if v.is_floating_point() and v.dim() else v for k, v in exact.items()
        }
        given = {
            k: v.detach().float() if v.dtype == torch.float64 else v.detach()
            for k, v in given.items()
        }
        for leaf in LEAVES:
            given[leaf].requires_grad_()
        total, _ = build({name: options}, impl="tiled")(**given)
        expected = loop(exact)
        assert total.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6), (
            f"{name} {options}"
        )
        for leaf in LEAVES:
            a, b = (
                torch.autograd.grad(v, d[leaf], retain_graph=True, materialize_grads=True)[
                    0
                ].double()
                for v, d in ((total, given), (expected, exact))
            )
            assert (a - b).norm() <= 1e-2 * b.norm() + 1e-5, f"{name} {options}, {leaf}"
            n += bool(b.norm() > 1e-6)

    assert n == N_LIVE


def aligned() -> dict[str, Tensor]:
    d = data()
    with torch.no_grad():
        d["text"].copy_(F.normalize(d["text"] + d["image"], dim=1))
    return d


def margins_on_rank() -> list:
    d = aligned()
    objective = build({"hard_negatives": {"form": "rank"}})
    first = objective(**own_rows(d), step=0)[0].item()
    saved = objective.state_dict()
    with torch.no_grad():
        objective(**own_rows(d), step=1)  # no gradient: an evaluation moves nothing
    objective(**own_rows(d))  # nor does a call without a step
    margins = [state["hard_negatives.rank"]["margin"] for state in (saved, objective.state_dict())]
    unmoved = torch.equal(*margins)
    later = build({"hard_negatives": {"form": "rank"}})
    later.load_state_dict(saved)
    return [
        first,
        saved["hard_negatives.rank"]["margin"].tolist(),
        unmoved,
        objective(**own_rows(d), step=1)[0].item(),
        later(**own_rows(d), step=1)[0].item(),
    ]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_margin_of_rank_is_the_previous_step_s(n_ranks):
    d = aligned()
    mean = sum(z(d, i, i) for i in CANDIDATES) / B

    margin = []
    for k in range(K):
        live = [i for i in CANDIDATES if d["negatives_valid"][i, k]]
        gap = mean - sum(d["scale"] * (d["image"][i] @ d["negatives"][i, k]) for i in live) / len(
            live
        )
        margin.append(min(max(gap.item(), 0.0), 10.0))

    assert max(margin) > 0
    results = ranks.run(n_ranks, margins_on_rank)
    first, second, loaded = (sum(r[i] for r in results) / n_ranks for i in (0, 3, 4))

    assert first == pytest.approx(rank([0, 0, 0])(d).item(), rel=1e-10)
    assert second == loaded == pytest.approx(rank(margin)(d).item(), rel=1e-10)
    for result in results:
        assert result[1] == pytest.approx(margin, rel=1e-10) and result[2]


def test_uniformity_on_the_sphere_is_the_written_one():
    """−2‖x − y‖² and 4x·y − 4 differ in gradient along x only: through a normalisation they are
    one.
    """
    raw = {
        name: torch.randn(B, D, dtype=torch.float64).requires_grad_() for name in ("image", "text")
    }
    unit = {name: F.normalize(v, dim=1) for name, v in raw.items()}

    def mean_kernel(x, y, cells):
        return torch.log(sum(torch.exp(-2 * distance(x[i], y[j])) for i, j in cells) / len(cells))

    upper = [(i, j) for i in CANDIDATES for j in range(i + 1, B)]
    written = (
        mean_kernel(unit["image"], unit["image"], upper)
        + mean_kernel(unit["text"], unit["text"], upper)
    ) / 2
    written = written + mean_kernel(
        unit["image"], unit["text"], [(i, j) for i in CANDIDATES for j in others(i)]
    )
    total, _ = build({"uniformity": {}, "cross_uniformity": {}})(**unit, scale=1.0)

    torch.testing.assert_close(total, written, rtol=1e-12, atol=0)

    for a, b in zip(
        *(torch.autograd.grad(v, list(raw.values()), retain_graph=True) for v in (total, written))
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        assert b.norm() > 1e-2


@pytest.mark.parametrize(
    "name, options, changed, valid",
    [
        ("counting", {}, "counterfactual", "counterfactual_valid"),
        *(
            ("hard_negatives", {"form": k}, "negatives", "negatives_valid")
            for k in ("negclip", "triplet", "own", "text", "rank", "intra")
        ),
        ("self_distillation", {"negatives": True}, "negatives", "negatives_valid"),
    ],
)
def test_invalid_entries_have_no_influence(name, options, changed, valid):
    d = data()
    before = gradients_of(build({name: options})(**d)[0], d)
    with torch.no_grad():
        d[changed][~d[valid]] = d[changed][~d[valid]].roll(1, dims=-1)
    after = gradients_of(build({name: options})(**d)[0], d)
    assert before == after
    with torch.no_grad():
        d[changed][d[valid]] = d[changed][d[valid]].roll(1, dims=-1)
    assert gradients_of(build({name: options})(**d)[0], d)[0] != before[0]
    nothing = build({name: options})(**d | {valid: torch.zeros_like(d[valid])})[0]
    if name == "counting" or options["form" if "form" in options else "negatives"] in (
        "own",
        "text",
        "rank",
    ):
        assert nothing == 0 and not any(torch.tensor(g).any() for g in gradients_of(nothing, d)[1:])


@pytest.mark.parametrize("name", ["uniformity", "cross_uniformity", "decoupled", "hn_nce", "macl"])
def test_terms_over_other_rows_need_two(name):
    d = {k: v[:1] if v.dim() else v for k, v in data().items()}
    with pytest.raises(ValueError, match=f"'{name}' needs at least 2 candidates a row, found 1"):
        build({name: {}})(**d)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("decoupled", {"sigma": 0}, "expected a number > 0"),
        ("hn_nce", {"beta": -1}, "expected numbers >= 0"),
        ("macl", {"alpha": 1}, "temperature could become negative"),
        ("cwcl", {"frozen": "txt"}, "did you mean 'text'"),
        ("hard_negatives", {"form": "negclip", "focal": 2}, "belong to form: own"),
        ("hard_negatives", {"form": "own", "image_weight": 1}, "belongs to form: negclip"),
        ("hard_negatives", {"form": "text", "negatives": "images"}, "no sides to exchange"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        build({name: options})


@pytest.mark.parametrize("form", ["negclip", "triplet"])
def test_one_candidate_without_a_valid_caption_gives_zero_and_no_gradient(form):
    shapes = {"image": (1, 4), "text": (1, 4)}
    shapes |= {"negatives": (1, 2, 4), "negative_images": (1, 1, 4)}
    unit = torch.nn.functional.normalize
    d = {
        n: unit(torch.randn(shape, dtype=torch.float64), dim=-1).requires_grad_()
        for n, shape in shapes.items()
    }
    total, _ = build({"hard_negatives": {"form": form}})(
        **d,
        negatives_valid=torch.zeros(1, 2, dtype=torch.bool),
        negative_images_valid=torch.zeros(1, 1, dtype=torch.bool),
        scale=10.0,
    )

    assert total == 0
    # And none is NaN.
    assert all(
        not g.any() for g in torch.autograd.grad(total, list(d.values()), materialize_grads=True)
    )
