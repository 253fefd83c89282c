"""Distributions of scores, AUC and tolerance against loops in float64."""

import math

import pytest
import torch

from vlp.eval import distributions


def rows(n: int, seed: int, dim: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


def loop_auc(matching, other) -> float:
    points = [float(a > b) + 0.5 * float(a == b) for a in matching for b in other]
    return sum(points) / len(points)


@pytest.mark.parametrize("n", [2, 7, 150])
def test_pair_scores_equal_the_loop(n):
    text = rows(n, 0)
    image = torch.nn.functional.normalize(text + rows(n, 1), dim=1)
    scores = (image.double() @ text.double().T).tolist()
    own = [scores[i][i] for i in range(n)]
    others = [s for i, row in enumerate(scores) for j, s in enumerate(row) if i != j]

    pairs = distributions.pair_scores(image, text)
    measured = pairs.values
    mean = sum(others) / len(others)
    assert measured["score_mean"] == pytest.approx(sum(own) / n)
    assert measured["other_score_mean"] == pytest.approx(mean)
    variance = sum((s - mean) ** 2 for s in others) / len(others)
    assert measured["other_score_sd"] == pytest.approx(math.sqrt(variance), abs=1e-9)
    # 150 pairs have more scores than are sorted.
    assert (n * (n - 1) > distributions.EXACT) == (n == 150)
    assert measured["auc"] == pytest.approx(loop_auc(own, others), abs=1e-9 if n < 150 else 1e-3)

    def shares(values):
        places = [min(127, int((value + 1) * 64)) for value in values]
        return [places.count(b) / len(places) for b in range(128)]

    overlap = sum(map(min, shares(own), shares(others)))
    assert measured["score_overlap"] == pytest.approx(overlap)
    drawn = distributions.pair_scores(image, text).shares
    assert drawn[0].tolist() == pytest.approx(shares(own))
    assert drawn[1].tolist() == pytest.approx(shares(others))


@pytest.mark.parametrize("tile", [(1024, 2048), (3, 5)])
@pytest.mark.parametrize("n", [2, 7, 30])
def test_auc_of_every_query_equals_the_loop(n, tile, monkeypatch):
    """Some texts are the same: their scores tie however they are computed."""
    monkeypatch.setattr(distributions, "_TILE_ROWS", tile[0])
    monkeypatch.setattr(distributions, "_TILE_COLUMNS", tile[1])
    text = rows(n, 0)[[i - (i % 3 == 1) for i in range(n)]]
    image = torch.nn.functional.normalize(text + 0.5 * rows(n, 1), dim=1)
    scores = [[sum(a * b for a, b in zip(x, t)) for t in text.tolist()] for x in image.tolist()]

    def points(own, other):
        return 0.5 if abs(own - other) < 1e-12 else float(own > other)

    pairs = distributions.pair_scores(image, text)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        by_image = [points(scores[i][i], scores[i][j]) for j in others]
        by_text = [points(scores[i][i], scores[j][i]) for j in others]
        assert float(pairs.auc_by_image[i]) == pytest.approx(sum(by_image) / (n - 1))
        assert float(pairs.auc_by_text[i]) == pytest.approx(sum(by_text) / (n - 1))
    assert 0.5 in [points(scores[0][0], scores[0][1])] and pairs.values["auc_error"] == 0

    # Pooled, pairs of one query compete with those of all others.
    own = [scores[i][i] for i in range(n)]
    others = [scores[i][j] for i in range(n) for j in range(n) if i != j]
    pooled = [points(a, b) for a in own for b in others]
    assert pairs.values["auc"] == pytest.approx(sum(pooled) / len(pooled))


def test_memory_does_not_grow_with_the_pairs_of_pairs(monkeypatch):
    """No tensor that is made is larger than a tile, but for histograms."""
    monkeypatch.setattr(distributions, "_TILE_ROWS", 32)
    monkeypatch.setattr(distributions, "_TILE_COLUMNS", 64)
    n, sizes = 400, []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            tensors = filter(torch.is_tensor, torch.utils._pytree.tree_leaves(made))
            sizes.extend(tensor.numel() for tensor in tensors)
            return made

    image, text = rows(n, 0, 2), rows(n, 1, 2)
    with Sizes():
        distributions.pair_scores(image, text)
        distributions.tolerance(image, torch.arange(n) % 3)
    assert len(sizes) > 500 and {n for n in sizes if n > 32 * 64} == {distributions.BINS}


def test_auc_counts_ties_half_and_its_bins_say_how_wrong_they_may_be():
    matching, other = torch.tensor([0.5, 0.5, 0.2]), torch.tensor([0.5, 0.1, 0.2, 0.9])
    assert distributions.auc(matching, other) == pytest.approx(loop_auc(matching, other))
    assert distributions.auc(torch.ones(3), torch.ones(5)) == 1 / 2

    a, b = rows(400, 2)[:, 0], rows(300, 3)[:, 0] - 0.1
    area, error = distributions.auc_of_histograms(
        distributions.histogram(a), distributions.histogram(b)
    )
    assert abs(area - distributions.auc(a, b)) <= error + 1e-12 and error < 1e-3


def test_tolerance_equals_the_loop_over_pairs():
    points, labels = rows(30, 4).double(), torch.arange(30) % 4
    products = points @ points.T
    same = [
        float(products[i, j])
        for i, j in torch.cartesian_prod(torch.arange(30), torch.arange(30)).tolist()
        if i != j and labels[i] == labels[j]
    ]
    within, over_all = distributions.tolerance(points, labels)
    assert within == pytest.approx(sum(same) / len(same))
    assert over_all == pytest.approx(sum(same) / (30 * 29))
    assert math.isnan(distributions.tolerance(points[:4], torch.arange(4))[0])
