"""Every way to compute a loss equals the float64 single-process truth, in value and in every
gradient.

Full product in float64 at small B; a covering design in float32 and bfloat16; and negative
controls: the mistakes that such code is prone to, each of which must fail the same assertion.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
import torch

from tests import ranks
from tests.pairwise import exact
from tests.pairwise.exact import Case, assert_equal, combine, mean_over_ranks, step_truth, truth
from vlp.losses import build
from vlp.pairwise import Topology

IMPLS = ("dense", "tiled")
LOSSES = ("infonce", "siglip")
SCALES = (1.0, 14.0, 100.0)


def run_all(function: str, cases: list[Case], *args) -> list[list]:
    """Results [case][rank]; each number of ranks is started once and computes all its cases."""
    by_ranks = defaultdict(list)
    for case in cases:
        by_ranks[case.n_ranks].append(case)
    results = {}
    for n, group in by_ranks.items():
        found = ranks.run(n, exact.every, function, group, *args)
        results |= {case: [found[rank][i] for rank in range(n)] for i, case in enumerate(group)}
    return [results[case] for case in cases]


def test_full_product_in_float64():
    """impl × ranks × topology × micro-batches × scale × loss × pairs, through `train_step`."""
    cases = [
        Case(loss, impl, n, topology, m, scale, aligned)
        for loss, impl, n, topology, m, scale, aligned in product(
            LOSSES, IMPLS, (1, 2, 4), ("global", "ring"), (1, 3, 4), SCALES, (False, True)
        )
    ]
    for case, found in zip(cases, run_all("step_of_rank", cases)):
        assert_equal(case, mean_over_ranks(found), step_truth(case))
    assert len(cases) == 432


def test_uneven_valid_samples():
    """Means over valid samples, 0, 6, 6 and 7 of them on four ranks and as uneven in the
    micro-batches.
    """
    cases = [
        Case("infonce", impl, n, topology, m, aligned=True)
        for impl, n, topology, m in product(IMPLS, (1, 2, 4), ("global", "ring"), (1, 3, 4))
    ]
    for case, found in zip(cases, run_all("mixed_step_of_rank", cases)):
        assert_equal(case, mean_over_ranks(found), exact.mixed_truth(case))
    counts = exact.mixed_batch(cases[-1])[-1].view(4, -1).sum(1).tolist()
    assert counts == [0, 6, 6, 7] and len(cases) == 36


def covering(dtype: str) -> list[Case]:
    """Each (impl, loss) meets every value of every other factor."""
    others = [
        (1, "global", 1.0, False, 37),
        (1, "global", 100.0, True, 37),
        (1, "global", 14.0, True, 64),
        (2, "global", 14.0, True, 23),
        (2, "ring", 100.0, True, 23),
        (2, "global", 100.0, False, 16),
        (4, "ring", 14.0, False, 11),
        (4, "global", 100.0, True, 11),
        (4, "global", 1.0, True, 9),
    ]
    return [
        Case(loss, impl, n, topology, 1, scale, aligned, rows, dtype, tile_size=tile)
        for loss in LOSSES
        for impl in IMPLS
        for (n, topology, scale, aligned, rows), tile in zip(others, (8, 5, 0) * 3)
        if impl == "tiled" or (dtype, topology) == ("float64", "global")
    ]


@pytest.mark.parametrize(
    "dtype, n_cases",
    [
        ("float64", 32),
        pytest.param("float32", 18, marks=pytest.mark.slow),
        ("bfloat16", 18),
    ],
)
def test_gradients_of_embeddings(dtype, n_cases):
    """Gradients of each rank's own rows, scale and bias. (Dense float32 is not held to this: it is
    off, see below.)
    """
    cases = covering(dtype)
    for case, found in zip(cases, run_all("embeddings_of_rank", cases)):
        assert_equal(case, combine(found), truth(case))
    assert len(cases) == n_cases


def test_groups_equal_the_mean_over_groups():
    layouts = {
        (("group", 2), ("layout", "contiguous")): [[[0, 1], [2, 3]]] * 2,
        (("group", 2), ("layout", "strided")): [[[0, 2], [1, 3]]] * 2,
        (("group", 2), ("layout", "strided"), ("exchange", "ring")): [[[0, 2], [1, 3]]] * 2,
        (("group", 1),): [[[0], [1], [2], [3]]] * 2,
        "local": [[[0], [1], [2], [3]]] * 2,
    }
    alternating = (("group", 2), ("layout", "alternating"))
    rotation = [Topology(2, "alternating").partition(4, step) for step in range(3)]
    cases = {
        Case(loss, impl, 4, topology, aligned=True, step=step): [list(g) for g in groups]
        for loss, impl in product(LOSSES, IMPLS)
        for topology, steps in [*layouts.items(), (alternating, rotation)]
        for step, groups in enumerate(steps)
    }
    for (case, groups), found in zip(cases.items(), run_all("embeddings_of_rank", list(cases))):
        assert_equal(case, combine(found), truth(case, groups))
    assert len(cases) == 52 and len({tuple(map(tuple, g)) for g in rotation}) == 3


def test_kept_tiles_change_nothing():
    n = 0
    for loss, scale in product(LOSSES, SCALES):
        case = Case(loss, "tiled", 1, scale=scale, aligned=True, rows=37)
        x, t = exact.pairs_of(case)
        for budget in (0, 8 * 5 * 5 * 3, 10**6):
            objective = exact.objective_of(case)
            object.__setattr__(objective.backend, "memory_budget", budget)
            leaves = [x.clone().requires_grad_(), t.clone().requires_grad_()]
            leaves += [
                torch.tensor(v, dtype=torch.float64, requires_grad=True)
                for v in (scale, exact.BIAS)
            ]
            total, _ = objective(**dict(zip(("image", "text", "scale", "bias"), leaves)))
            gradients = torch.autograd.grad(
                total, leaves, retain_graph=True, materialize_grads=True
            )
            # Nothing kept was overwritten.
            again = torch.autograd.grad(total, leaves, materialize_grads=True)
            assert_equal(case, [total.detach(), *gradients], truth(case))
            assert all(torch.equal(a, b) for a, b in zip(gradients, again))
            n += 1

    assert n == 18


# Negative controls: each is wrong in a way that leaves the loss right, and must not pass


def detached_gather(case: Case) -> list:
    from vlp import dist

    gather = dist._AllGather.backward
    dist._AllGather.backward = staticmethod(
        lambda ctx, g: (g.chunk(ctx.group.size)[ctx.group.index], None)
    )

    try:
        return exact.embeddings_of_rank(case)
    finally:
        dist._AllGather.backward = gather


def averaging_scatter(case: Case) -> list:
    from vlp import dist

    scatter = dist._scatter_sum
    dist._scatter_sum = lambda value, group: scatter(value, group) / group.size

    try:
        return exact.embeddings_of_rank(case)
    finally:
        dist._scatter_sum = scatter


@pytest.mark.parametrize("mistake", [detached_gather, averaging_scatter])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_gathers_are_noticed(mistake, impl, loss):
    case = Case(loss, impl, 2, aligned=True)
    found = combine(ranks.run(2, mistake, case))
    expected = truth(case)

    assert_equal(case, found[:1], expected[:1])  # the loss is right, which is why nobody notices
    with pytest.raises(AssertionError, match="text: error"):
        assert_equal(case, found, expected)


def test_a_factor_of_the_rank_count_is_noticed():
    case = Case("infonce", "tiled", 2)
    found = combine(ranks.run(2, exact.embeddings_of_rank, case))

    assert_equal(case, found, truth(case))
    for i in range(1, 4):
        with pytest.raises(AssertionError):
            assert_equal(case, [f * 2 if j == i else f for j, f in enumerate(found)], truth(case))


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_dropout_is_replayed(micro_batches):
    """Two passes with dropout equal one graph over the same micro-batches; without replay they do
    not.
    """
    case = Case("infonce", "tiled", 1, micro_batches=micro_batches, aligned=True)
    expected = one_graph(case, 0.3)
    (found,) = ranks.run(1, exact.step_of_rank, case, 0.3)

    assert_equal(case, mean_over_ranks([found]), expected)
    (forgetful,) = ranks.run(1, exact.step_of_rank, case, 0.3, False)
    with pytest.raises(AssertionError):
        assert_equal(case, mean_over_ranks([forgetful]), expected)


def one_graph(case: Case, dropout: float) -> list[torch.Tensor]:
    """The truth of one step over the same micro-batches, activations and masks kept."""
    from vlp.seeds import derive

    x, t = exact.pairs_of(case)
    model = exact.LinearTowers(case.scale, dropout)
    outputs = []
    for i, (xs, ts) in enumerate(zip(x.chunk(case.micro_batches), t.chunk(case.micro_batches))):
        torch.manual_seed(derive(0, "model", case.step, i, 0))
        outputs.append(model(xs, ts))
    image, text = (torch.cat([getattr(o, name) for o in outputs]) for name in ("image", "text"))
    loss = exact.loss_of(case.loss, image, text, model.scale, model.bias)
    loss.backward()
    return [loss.detach(), *model.gradients()]


# Edge cases


@pytest.mark.parametrize("impl", IMPLS)
def test_one_row_has_no_contrast(impl):
    x = torch.nn.functional.normalize(torch.randn(1, 4), dim=1).requires_grad_()
    t = torch.nn.functional.normalize(torch.randn(1, 4), dim=1).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    total, _ = build({"infonce": {}}, impl=impl)(image=x, text=t, scale=scale)
    gradients = torch.autograd.grad(total, [x, t, scale])

    assert total == 0 and all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_identical_embeddings_give_log_n(impl, dtype):
    x = torch.zeros(40, 4, dtype=dtype)
    x[:, 0] = 1
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    total, _ = build({"infonce": {}}, impl=impl)(image=leaves[0], text=leaves[1], scale=100.0)

    assert total.item() == pytest.approx(torch.log(torch.tensor(40.0)).item(), rel=1e-6)
    assert all(g.norm() < 1e-2 for g in torch.autograd.grad(total, leaves))


def test_bfloat16_at_scale_100():
    case = Case(
        "infonce", "tiled", 1, scale=100.0, aligned=True, rows=200, dtype="bfloat16", tile_size=64
    )
    found = combine([exact.embeddings_of_rank(case)])

    assert all(torch.isfinite(f).all() for f in found)
    assert_equal(case, found, truth(case))


def test_float32_where_dense_is_wrong():
    """Pairs at cosine .999 and scale 100: the tiled engine keeps its accuracy on a loss of 1e-30
    and less.
    """
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    t = torch.nn.functional.normalize(x + 0.003 * torch.randn(64, 128), dim=1)

    def gradients(dtype, impl):
        leaves = [e.to(dtype).requires_grad_() for e in (x, t)] + [
            torch.tensor(100.0, dtype=dtype, requires_grad=True)
        ]
        total, _ = build({"infonce": {}}, impl=impl)(
            image=leaves[0], text=leaves[1], scale=leaves[2]
        )
        return [total.detach().double(), *(g.double() for g in torch.autograd.grad(total, leaves))]

    for found, expected in zip(
        gradients(torch.float32, "tiled"), gradients(torch.float64, "dense")
    ):
        assert 0 < expected.norm() < 1e-20
        assert (found - expected).norm() <= 5e-5 * expected.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_is_never_hidden(impl):
    x, t = exact.pairs_of(Case("infonce", impl, 1))
    x[3, 2] = torch.nan
    for loss, scale in product(LOSSES, SCALES):
        total, _ = build({loss: {}}, impl=impl)(image=x, text=t, scale=scale, bias=0.0)
        assert torch.isnan(total)
