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

    measured = distributions.pair_scores(image, text)
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
