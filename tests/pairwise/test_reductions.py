"""Every reduction that objectives may ask for, against naive loops in float64, on 1, 2 and 4 ranks.

Each entry of REDUCTIONS pairs `share(pairs, data)`, computed by the engine on a rank's own rows,
with `loop(data)`, the same number from its definition over the whole batch. Values and gradients of
all inputs are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import ranks
from vlp import dist
from vlp.pairwise import LOGSUMEXP, SUM, Backend, Pairs, Reduction, Tile, Topology, softplus

B, D, K = 8, 5, 3


@dataclass
class Data:
    image: Tensor  # [B, D]
    text: Tensor  # [B, D]
    extra: Tensor  # [B, K, D] hard captions
    scale: Tensor  # []
    row_scale: Tensor  # [B]
    teacher: Tensor  # [B, D]
    weight: Tensor  # [B] arbitrary, so that no gradient is a constant
    valid: Tensor  # [B, K] bool, uneven between ranks
    none: Tensor  # [B] bool, all False

    LEAVES = ("image", "text", "extra", "scale", "row_scale", "teacher")

    def own(self) -> Data:
        rows = slice(
            dist.rank() * B // dist.world_size(), (dist.rank() + 1) * B // dist.world_size()
        )
        return replace(self, **{k: v[rows] for k, v in vars(self).items() if v.dim()})


def data() -> Data:
    generator = torch.Generator().manual_seed(3)

    def rows(*shape: int) -> Tensor:
        return F.normalize(
            torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1
        ).requires_grad_()

    return Data(
        image=rows(B, D),
        text=rows(B, D),
        extra=rows(B, K, D),
        teacher=rows(B, D),
        scale=torch.tensor(7.0, dtype=torch.float64, requires_grad=True),
        row_scale=torch.linspace(2, 9, B, dtype=torch.float64).requires_grad_(),
        weight=torch.linspace(-1, 2, B, dtype=torch.float64),
        valid=torch.arange(B * K).reshape(B, K) % 5 > 1,
        none=torch.zeros(B, dtype=torch.bool),
    )


def lse(values: list[Tensor]) -> Tensor:
    return torch.log(sum(v.exp() for v in values))


def weighted(d: Data, per_row) -> Tensor:
    """(1/B) Σ_i weight_i · per_row(i)."""
    return sum(d.weight[i] * per_row(i) for i in range(B)) / B


def others(i: int) -> list[int]:
    return [j for j in range(B) if j != i]


# engine side / loop side, in pairs


def margin(pairs, d):
    rows, columns = pairs.margin_logsumexp(d.image, d.text, d.scale)
    return pairs.mean(d.weight * rows + columns)


def margin_loop(d):
    def one(i):
        z = [[d.scale * (d.image[k] @ d.text[j]) for j in range(B)] for k in range(B)]
        return (
            d.weight[i] * (lse([z[i][j] for j in others(i)]) - z[i][i])
            + lse([z[j][i] for j in others(i)])
            - z[i][i]
        )

    return sum(one(i) for i in range(B)) / B


def multiples(pairs, d):
    ((r1, c1), (r2, c2)), positive = pairs.multiples_logsumexp(
        d.image, d.text, d.scale, (1.25, 0.25)
    )
    return pairs.mean(d.weight * (r1 - 2 * r2) + c1 * c2 + positive)


def multiples_loop(d):
    def z(i, j):
        return d.scale * (d.image[i] @ d.text[j])

    def one(i):
        r1, r2 = (lse([m * z(i, j) for j in others(i)]) for m in (1.25, 0.25))
        c1, c2 = (lse([m * z(j, i) for j in others(i)]) for m in (1.25, 0.25))
        return d.weight[i] * (r1 - 2 * r2) + c1 * c2 + z(i, i)

    return sum(one(i) for i in range(B)) / B


def per_row_tile(tile: Tile):
    z = tile.row_values[0].unsqueeze(1) * tile.scores[0]
    w = tile.column_values[0] * tile.scores[0]
    return z.masked_fill(tile.positive, -torch.inf), w.masked_fill(tile.positive, -torch.inf)


def row_scales(pairs, d):
    reduction = Reduction(per_row_tile, rows=(LOGSUMEXP,), columns=(LOGSUMEXP,))
    rows, columns = pairs.reduce(
        reduction, [d.image], [d.text], row_values=[d.row_scale], column_values=[d.row_scale**2]
    )
    return pairs.mean(d.weight * rows + columns)


def row_scales_loop(d):
    def one(i):
        rows = lse([d.row_scale[i] * (d.image[i] @ d.text[j]) for j in others(i)])
        return d.weight[i] * rows + lse(
            [d.row_scale[i] ** 2 * (d.image[j] @ d.text[i]) for j in others(i)]
        )

    return sum(one(i) for i in range(B)) / B


def extra_columns(pairs, d):
    rows, _, positive = pairs.logsumexp(d.image, d.text, d.scale)
    hard = pairs.row_logsumexp(d.image, d.extra.flatten(0, 1), d.scale, valid=d.valid.flatten())
    nothing = pairs.row_logsumexp(d.image, d.text, d.scale, valid=d.none)

    assert (nothing == -torch.inf).all()
    total = torch.logaddexp(torch.logaddexp(rows, hard), nothing)
    return pairs.mean(d.weight * softplus(total - positive))


def extra_columns_loop(d):
    captions = [d.extra[k, c] for k in range(B) for c in range(K) if d.valid[k, c]]

    def one(i):
        z = [d.scale * (d.image[i] @ t) for t in [*d.text, *captions]]
        return lse(z) - z[i]

    return weighted(d, one)


def uniformity(pairs, d):
    rows = pairs.row_logsumexp(d.image, d.image, 4.0, paired=True)
    return pairs.log_sum(rows) - math.log(B * (B - 1)) - 4


def uniformity_loop(d):
    # −2‖x_i − x_j‖² = 4x_i·x_j − 4 on the sphere; written so here because the two differ off it
    return lse([4 * (d.image[i] @ d.image[j]) - 4 for i in range(B) for j in others(i)]) - math.log(
        B * (B - 1)
    )


def weighted_tile(tile: Tile):
    w = (1 + tile.scores[1]) / 2
    return (w * tile.shared[0] * tile.scores[0], w)


def second_scores(pairs, d):
    reduction = Reduction(weighted_tile, rows=(SUM, SUM))
    sums, norms = pairs.reduce(
        reduction, [d.image, d.teacher], [d.text, d.teacher], shared=[d.scale], paired=False
    )
    return pairs.mean(d.weight * sums / norms)


def second_scores_loop(d):
    def one(i):
        w = [(1 + d.teacher[i] @ d.teacher[j]) / 2 for j in range(B)]
        return sum(w[j] * d.scale * (d.image[i] @ d.text[j]) for j in range(B)) / sum(w)

    return weighted(d, one)


def linear(pairs, d):
    rows, columns = pairs.linear_sums(d.image, d.text, d.scale)
    return pairs.mean(d.weight * rows + columns**2)


def linear_loop(d):
    def one(i):
        rows = sum(d.scale * (d.image[i] @ d.text[j]) for j in range(B))
        return d.weight[i] * rows + sum(d.scale * (d.image[j] @ d.text[i]) for j in range(B)) ** 2

    return sum(one(i) for i in range(B)) / B


def four_tile(tile: Tile):
    xx, tt, xt, tx = tile.scores
    return ((xx - tt) ** 2 + (xt - tx) ** 2, (xx - tt) ** 2 * xt)


def four_matrices(pairs, d):
    reduction = Reduction(four_tile, rows=(SUM,), columns=(SUM,))
    rows, columns = pairs.reduce(
        reduction,
        [d.image, d.text, d.image, d.text],
        [d.image, d.text, d.text, d.image],
        paired=False,
    )
    return pairs.mean(d.weight * rows + columns)


def four_matrices_loop(d):
    def cells(i, j):
        return (
            d.image[i] @ d.image[j],
            d.text[i] @ d.text[j],
            d.image[i] @ d.text[j],
            d.text[i] @ d.image[j],
        )

    def row(i, j):
        xx, tt, xt, tx = cells(i, j)
        return (xx - tt) ** 2 + (xt - tx) ** 2

    def column(i, j):
        xx, tt, xt, _ = cells(i, j)
        return (xx - tt) ** 2 * xt

    return sum(d.weight[i] * row(i, j) + column(i, j) for i in range(B) for j in range(B)) / B


def own_text_rows(pairs, d):
    """Different sets: anchors are texts, columns are all hard captions of the group."""
    rows = pairs.row_logsumexp(d.text, d.extra.flatten(0, 1), d.scale)
    return pairs.mean(d.weight * rows)


def own_text_rows_loop(d):
    return weighted(d, lambda i: lse([d.scale * (d.text[i] @ t) for t in d.extra.flatten(0, 1)]))


def best(pairs, d):
    scores, columns, positions = pairs.top_k(d.image, d.text, 3)
    assert scores.shape == positions.shape == (len(d.image), 3) and columns.shape == (
        len(d.image),
        3,
        D,
    )
    return pairs.mean(
        d.weight * (scores * torch.tensor([1.0, -2.0, 3.0])).sum(1) + columns.pow(3).sum((1, 2))
    )


def best_loop(d):
    def one(i):
        order = sorted(others(i), key=lambda j: -(d.image[i] @ d.text[j]).item())[:3]
        scores = sum(w * (d.image[i] @ d.text[j]) for w, j in zip((1.0, -2.0, 3.0), order))
        return d.weight[i] * scores + sum(d.text[j].pow(3).sum() for j in order)

    return sum(one(i) for i in range(B)) / B


def all_against_all(tile: Tile):
    """Mann-Whitney: every off-diagonal score of the tile against every diagonal of the group."""
    differences = tile.scores[0].unsqueeze(-1) - tile.shared[1]
    return (softplus(tile.shared[0] * differences).sum(-1).masked_fill(tile.positive, 0),)


def mann_whitney(pairs, d):
    diagonal = pairs.gather((d.image * d.text).sum(1))
    (rows,) = pairs.reduce(
        Reduction(all_against_all, rows=(SUM,)), [d.image], [d.text], shared=[d.scale, diagonal]
    )
    return pairs.mean(rows)


def mann_whitney_loop(d):
    own = [d.image[i] @ d.text[i] for i in range(B)]
    cells = [d.image[k] @ d.text[j] for k in range(B) for j in others(k)]
    return sum(torch.log1p((d.scale * (c - o)).exp()) for c in cells for o in own) / B


def masked_mean(pairs, d):
    """Uneven validity, values that are NaN or infinite where invalid, and a mean over nothing."""
    values = (d.text.unsqueeze(1) * d.extra).sum(2) * d.scale
    poisoned = torch.where(d.valid, values, torch.nan)
    nothing = pairs.mean(torch.where(d.none, values[:, 0], torch.inf), d.none)

    assert nothing == 0
    return (
        pairs.mean(poisoned, d.valid)
        + nothing
        + pairs.mean(values, d.valid * d.weight.abs().unsqueeze(1))
    )


def masked_mean_loop(d):
    cells = [(i, k) for i in range(B) for k in range(K) if d.valid[i, k]]
    value = {(i, k): (d.text[i] @ d.extra[i, k]) * d.scale for i, k in cells}
    weights = {(i, k): d.weight[i].abs() for i, k in cells}
    return sum(value.values()) / len(cells) + sum(weights[c] * value[c] for c in cells) / sum(
        weights.values()
    )


def totals(pairs, d):
    return (pairs.sum(d.image.exp().sum(1)) + 3).log() * pairs.mean(d.weight * 0 + 1)


def totals_loop(d):
    return (sum(v.exp() for row in d.image for v in row) + 3).log()


REDUCTIONS = {
    "margin": (margin, margin_loop),
    "multiples": (multiples, multiples_loop),
    "per-row scale": (row_scales, row_scales_loop),
    "extra masked columns": (extra_columns, extra_columns_loop),
    "within a modality": (uniformity, uniformity_loop),
    "second score matrix": (second_scores, second_scores_loop),
    "linear sums": (linear, linear_loop),
    "four matrices": (four_matrices, four_matrices_loop),
    "different sets": (own_text_rows, own_text_rows_loop),
    "top k": (best, best_loop),
    "all against all": (mann_whitney, mann_whitney_loop),
    "masked means": (masked_mean, masked_mean_loop),
    "totals": (totals, totals_loop),
}


def gradients_of(value: Tensor, d: Data) -> list:
    leaves = [getattr(d, name) for name in Data.LEAVES]
    return [
        value.item(),
        *(g.tolist() for g in torch.autograd.grad(value, leaves, materialize_grads=True)),
    ]


def on_rank(plans: list[tuple[str, str]]) -> list[list]:
    """[plan][reduction] -> value share and this rank's gradients of the whole batch's leaves."""
    results = []
    for impl, topology in plans:
        backend = Backend(topology=Topology.read(topology), impl=impl, tile_size=3)
        pairs = Pairs.at(backend)
        results.append([])
        for share, _ in REDUCTIONS.values():
            d = data()
            results[-1].append(gradients_of(share(pairs, d.own()), d))

    return results


PLANS = [(impl, topology) for impl in ("dense", "tiled") for topology in ("global", "ring")]


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_reductions_equal_loops(n_ranks):
    expected = [gradients_of(loop(d), d) for _, loop in REDUCTIONS.values() for d in [data()]]
    found = ranks.run(n_ranks, on_rank, PLANS)

    n_cases = n_live = 0
    for p, plan in enumerate(PLANS):
        for r, name in enumerate(REDUCTIONS):
            # each rank holds its own rows of the leaves, so the mean over ranks is the whole
            # gradient
            for i, leaf in enumerate(("value", *Data.LEAVES)):
                mean = (
                    sum(
                        torch.tensor(found[k][p][r][i], dtype=torch.float64) for k in range(n_ranks)
                    )
                    / n_ranks
                )
                wanted = torch.tensor(expected[r][i], dtype=torch.float64)
                error = (mean - wanted).norm()
                assert error <= 1e-10 * wanted.norm() + 1e-12, (
                    f"{name}, {plan}, {leaf}: {mean} is not {wanted}"
                )
                n_live += bool(wanted.norm() > 1e-6)
            n_cases += 1

    assert n_cases == 4 * 13 and n_live == 4 * 48, "the comparison must not be empty"


def test_top_k_of_too_few():
    d = data()
    with pytest.raises(ValueError, match="top 8 of 7 candidates; use at most 7"):
        Pairs.at(Backend()).top_k(d.image, d.text, 8)


def half_precision_on_rank() -> list[list]:
    """This rank's share of means and sums of bfloat16 numbers, and of their gradients."""
    pairs = Pairs.at(Backend())
    n_values = 301 + 2 * dist.rank()
    values = torch.linspace(0.5, 1.5, n_values).bfloat16()
    valid = torch.arange(n_values) % 7 > 0
    weights = torch.linspace(0, 1, n_values).bfloat16()

    results = []
    for reduce in (
        lambda rows: pairs.mean(rows, valid),
        lambda rows: pairs.mean(rows, weights),
        lambda rows: pairs.sum(rows) / dist.world_size(),
        lambda rows: pairs.sum_over_ranks(rows[:3]).sum() / dist.world_size(),
        lambda rows: pairs.log_sum(rows[:5]) / dist.world_size(),
    ):
        leaf = values.clone().requires_grad_()
        total = reduce(leaf)
        assert total.dtype == torch.float32
        total.backward()
        results.append([total.item(), leaf.grad.double().sum().item()])
    return results


def half_precision_loop(n_ranks: int) -> list[float]:
    """The same numbers in float64 over all ranks."""
    sizes = [301 + 2 * rank for rank in range(n_ranks)]
    values = [torch.linspace(0.5, 1.5, n).bfloat16().double() for n in sizes]
    valid = torch.cat([torch.arange(n) % 7 > 0 for n in sizes])
    weights = torch.cat([torch.linspace(0, 1, n).bfloat16().double() for n in sizes])
    rows = torch.cat(values)

    return [
        rows[valid].mean().item(),
        ((weights * rows).sum() / weights.sum()).item(),
        rows.sum().item() / n_ranks,
        sum(part[:3].sum().item() for part in values) / n_ranks,
        torch.cat([part[:5] for part in values]).logsumexp(0).item() / n_ranks,
    ]


@pytest.mark.parametrize("n_ranks", [1, 4])
def test_half_precision_is_summed_in_float32(n_ranks):
    """More numbers than bfloat16 can count, and counts that its sum over ranks would round."""
    by_rank = ranks.run(n_ranks, half_precision_on_rank)
    expected = half_precision_loop(n_ranks)

    for k, value in enumerate(expected):
        mean = sum(shares[k][0] for shares in by_rank) / n_ranks
        assert mean == pytest.approx(value, rel=1e-5), f"sum {k}"

    # Gradients of a mean add to 1; each of them is rounded to the values' dtype, their count not.
    for k in (0, 1):
        total_gradient = sum(shares[k][1] for shares in by_rank) / n_ranks
        assert total_gradient == pytest.approx(1, rel=3e-3), f"mean {k}"
