"""Metrics against plain loops in float64, and the intervals against their definitions."""

import math

import numpy as np
import pytest
import torch

from tests.eval import material
from vlp.eval import choices, confidence, metrics, probes


def rows(n: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )


@pytest.fixture(params=[(1024, 4096), (7, 5)], ids=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(metrics, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(metrics, "TILE_COLUMNS", request.param[1])


def naive_retrieval(image, text, owner):
    scores = text.double() @ image.double().T
    image_rank, text_rank = [], []
    for i in range(len(image)):
        best = max(scores[m, i] for m in range(len(text)) if owner[m] == i)
        image_rank.append(
            1
            + sum(
                bool(scores[m, i] >= best - metrics.TIE) for m in range(len(text)) if owner[m] != i
            )
        )
    for m in range(len(text)):
        own = scores[m, owner[m]]
        text_rank.append(
            1
            + sum(
                bool(scores[m, i] >= own - metrics.TIE) for i in range(len(image)) if i != owner[m]
            )
        )
    return image_rank, text_rank


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("seed", range(3))
def test_retrieval_ranks_equal_the_loop(seed):
    image, text = rows(23, seed=seed), rows(61, seed=seed + 10)
    owner = torch.cat(
        [torch.arange(23), torch.randint(23, (38,), generator=torch.Generator().manual_seed(seed))]
    )
    owner = owner[torch.randperm(61, generator=torch.Generator().manual_seed(seed))]
    found = metrics.retrieval_ranks(image, text, owner)
    assert [r.tolist() for r in found] == list(naive_retrieval(image, text, owner.tolist()))


@pytest.mark.usefixtures("tiles")
def test_retrieval_of_a_constant_encoder_ranks_everything_last():
    same = rows(1)
    image_rank, text_rank = metrics.retrieval_ranks(
        same.expand(9, -1), same.expand(27, -1), torch.arange(9).repeat(3)
    )
    assert set(image_rank.tolist()) == {27 - 3 + 1}
    assert set(text_rank.tolist()) == {9}


def test_an_equal_foreign_caption_is_placed_before_the_right_one():
    image = torch.eye(3)
    image_rank, text_rank = metrics.retrieval_ranks(
        image, image[[0, 0, 2]], torch.tensor([0, 1, 2])
    )
    assert image_rank.tolist() == [2, 3, 1]  # image 0: its caption and the foreign equal one
    assert text_rank.tolist() == [1, 3, 1]


@pytest.mark.usefixtures("tiles")
def test_class_ranks_equal_the_loop():
    image, classes = rows(31), rows(12, seed=1)
    labels = torch.randint(12, (31,), generator=torch.Generator().manual_seed(2))
    scores = image.double() @ classes.double().T
    expected = [
        1 + sum(bool(scores[i, c] > scores[i, y]) for c in range(12)) for i, y in enumerate(labels)
    ]
    assert metrics.class_ranks(image, classes, labels).tolist() == expected


def test_of_equal_classes_the_first_wins():
    classes = torch.eye(3)[[0, 1, 1, 2]]
    assert metrics.class_ranks(torch.eye(3)[[1, 1]], classes, torch.tensor([1, 2])).tolist() == [
        1,
        2,
    ]


def test_per_class_weights_give_the_mean_of_recalls():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    hits = torch.tensor([1.0, 0, 0, 1, 1, 0], dtype=torch.float64)
    w = metrics.per_class_weights(labels)
    assert confidence.score(torch.stack([hits * w, w], 1)) == pytest.approx(
        (1 / 3 + 1 + 1 / 2) / 3, abs=1e-12
    )


def test_average_precision_equals_the_definition_and_places_ties_last():
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.1, 0.5]])
    targets = torch.tensor([[True, True], [False, False], [True, False]])
    assert metrics.average_precision(scores, targets).tolist() == pytest.approx(
        [(1 + 2 / 3) / 2, 1 / 3]
    )
    assert metrics.average_precision(scores, torch.zeros(3, 2, dtype=torch.bool)).tolist() == [0, 0]


@pytest.mark.usefixtures("tiles")
def test_representation_measures_equal_the_loops():
    x, t = (torch.nn.functional.normalize(rows(19, seed=seed).double(), dim=1) for seed in (0, 1))
    pairs = [(i, j) for i in range(19) for j in range(i)]
    loop = math.log(
        sum(math.exp(-2 * float((x[i] - x[j]).square().sum())) for i, j in pairs) / len(pairs)
    )
    assert metrics.uniformity(x) == pytest.approx(loop, abs=1e-10)
    assert metrics.alignment(x, t) == pytest.approx(
        sum(float((x[i] - t[i]).square().sum()) for i in range(19)) / 19
    )
    assert metrics.modality_gap(x, x) == 0
    assert metrics.uniformity(x[:1].expand(5, -1)) == pytest.approx(0, abs=1e-12)


def test_effective_rank_counts_equal_directions():
    assert metrics.effective_rank(torch.cat([torch.eye(4), -torch.eye(4)])) == pytest.approx(4)
    assert metrics.effective_rank(torch.ones(5, 3)) == pytest.approx(1)


def test_logistic_regression_is_at_its_optimum():
    features, labels = rows(40, 3).double(), torch.arange(40) % 3
    weight, bias = probes.logistic_regression(features, labels, 3, decay=0.01)
    weight.requires_grad_(), bias.requires_grad_()
    loss = (
        torch.nn.functional.cross_entropy(features @ weight.T + bias, labels)
        + 0.005 * weight.square().sum()
    )
    loss.backward()
    assert weight.grad.abs().max() < 1e-6
    assert bias.grad.abs().max() < 1e-6


@pytest.mark.usefixtures("tiles")
def test_nearest_neighbours_equal_the_loop():
    bank, queries = rows(30, 8), rows(11, 8, seed=1)
    bank_labels, labels = torch.arange(30) % 4, torch.arange(11) % 4
    found = metrics.nearest_neighbour_ranks(queries, bank, bank_labels, labels, 4, k=5)
    for i in range(11):
        near = sorted(range(30), key=lambda j: -float(queries[i] @ bank[j]))[:5]
        votes = [
            sum(
                math.exp((float(queries[i] @ bank[j]) - 1) / 0.07)
                for j in near
                if bank_labels[j] == c
            )
            for c in range(4)
        ]
        assert found[i] == sum(v >= votes[labels[i]] - 1e-12 for v in votes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0])
def test_rows_that_are_no_unit_rows_are_refused(bad):
    broken = rows(4)
    broken[2, 0] = bad
    with pytest.raises(ValueError, match="image embeddings"):
        metrics.check_unit_rows(broken, "image")


def test_wilson_equals_published_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for hits, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert confidence.wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    with pytest.raises(ValueError, match="found 3 of 2"):
        confidence.wilson(3, 2)


def test_wilson_is_used_for_plain_accuracies_and_the_bootstrap_otherwise():
    hits = torch.tensor([[1.0, 1]] * 30 + [[0.0, 1]] * 10)
    assert confidence.interval(hits) == confidence.wilson(30, 40)
    low, high = confidence.interval(torch.cat([hits, torch.tensor([[3.0, 5.0]])]))
    assert low < 33 / 45 < high


def test_the_bootstrap_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        captions = torch.randint(1, 4, (60,), generator=generator).double()
        hits = torch.binomial(captions, torch.full_like(captions, 0.3), generator=generator)
        items = torch.stack([hits, captions], 1)
        drawn = confidence.resampled(items, seed=trial, resamples=200)
        low, high = torch.quantile(
            drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)
        ).tolist()
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_pairing_narrows_the_interval_of_a_difference():
    generator = torch.Generator().manual_seed(0)
    easy = torch.rand(400, generator=generator)
    a = torch.stack([(easy > 0.30).double(), torch.ones(400, dtype=torch.float64)], 1)
    b = torch.stack([(easy > 0.35).double(), torch.ones(400, dtype=torch.float64)], 1)
    difference, low, high = confidence.paired_difference(a, b)
    assert difference == pytest.approx(confidence.score(a) - confidence.score(b))
    assert 0 < low < difference < high
    unpaired = (confidence.resampled(a, 1) - confidence.resampled(b, 2)).std()
    assert high - low < 2 * 1.96 * float(unpaired) / 2
    with pytest.raises(ValueError, match="same units"):
        confidence.paired_difference(a, b[:-1])


# --- ties of models that have nearly collapsed ----------------------------------------------------


def collapsed(n: int, spread: float, seed: int) -> torch.Tensor:
    """Unit rows around one direction: the cosines of two such sets are spread by about$
    eight times the square of `spread`.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, 32, generator=generator, dtype=torch.float64)
    rows = material.direction("same").double() + spread * noise
    return torch.nn.functional.normalize(rows, dim=1).float()


@pytest.mark.parametrize(("spread", "n_close"), [(1.0, 0), (1e-2, 4), (3e-3, 4), (1e-3, 12)])
def test_scores_of_a_nearly_collapsed_model_are_told_apart(spread, n_close):
    """Ranks equal those of a loop in float64 without any tolerance, but for few that are close."""
    image, text = collapsed(40, spread, 0), collapsed(80, spread, 1)
    owner = torch.arange(40).repeat_interleave(2)
    scores = text.double() @ image.double().T

    _, text_rank = metrics.retrieval_ranks(image, text, owner)
    expected = [1 + int((row > row[i]).sum()) for row, i in zip(scores, owner)]
    n_other = sum(rank != right for rank, right in zip(text_rank.tolist(), expected))
    assert n_other <= n_close

    labels = torch.arange(40)
    class_rank = metrics.class_ranks(image, text[::2], labels)
    of_images = image.double() @ text[::2].double().T
    expected = [1 + int((row > row[c]).sum()) for row, c in zip(of_images, labels)]
    assert sum(a != b for a, b in zip(class_rank.tolist(), expected)) <= n_close

    # Choices between captions: the first is best where its score is.
    groups = list(of_images[:, :5].unbind())
    hits = choices.first_is_best(groups)
    n_other = sum(bool(hit) != bool((s[0] > s[1:]).all()) for hit, s in zip(hits, groups))
    assert n_other <= n_close and len(groups) == 40


def test_the_tie_follows_the_spread_between_two_bounds():
    assert metrics.tie(0.1) == metrics.tie(1e-3) == metrics.TIE
    assert metrics.tie(5e-4) == pytest.approx(5e-7)
    assert metrics.tie(0.0) == metrics.ROUNDING
    same = material.direction("same").expand(700, 32)
    assert metrics.tie_of_products(same, same) == metrics.ROUNDING
    assert metrics.tie_of_groups([torch.full((4,), 0.7), torch.full((3,), 0.2)]) == metrics.ROUNDING
    assert metrics.tie_of_groups([]) == metrics.ROUNDING


# --- few units, groups ----------------------------------------------------------------------------


def plain(hits) -> torch.Tensor:
    values = torch.tensor(hits, dtype=torch.float64)
    return torch.stack([values, torch.ones_like(values)], 1)


def test_a_difference_on_few_units_has_a_width_though_none_differs():
    difference, low, high = confidence.paired_difference(plain([1] * 20), plain([1] * 20))
    assert difference == 0 and low < -0.05 and high > 0.05
    assert low == pytest.approx(-high, abs=0.01)

    # Against the beta posteriors of p10 and p01: 1 + 8 and 1 + 0 of 24.
    a, b = plain([1] * 10 + [0] * 10), plain([1] * 2 + [0] * 18)
    difference, low, high = confidence.paired_difference(a, b)
    assert difference == pytest.approx(0.4) and 0 < low < (9 - 1) / 24 < high < 1
    # More units give the bootstrap as before.
    a = plain([1] * 300)
    assert confidence.paired_difference(a, a) == (0, 0, 0)


def test_the_posterior_of_accuracies_is_that_of_the_four_counts():
    a, b = plain([1] * 10 + [0] * 10), plain([1] * 7 + [0] * 11 + [1] * 2)
    gammas = np.random.default_rng(1).standard_gamma([1 + 7, 1 + 3, 1 + 2, 1 + 8], (40_000, 4))
    shares = torch.from_numpy(gammas / gammas.sum(1, keepdims=True))
    expected = confidence.middle(shares[:, 1] - shares[:, 2])
    assert confidence.paired_posterior(a, b) == pytest.approx(expected, abs=6e-3)


@pytest.mark.parametrize("n", [1, 20, 299])
def test_shares_of_several_captions_have_a_width_too(n):
    """Recalls of images with five captions, and recalls weighted by class: 0 wide before."""
    captions = torch.tensor([[5.0, 5.0]]).repeat(n, 1)
    weighted = torch.stack([torch.ones(n) / 7, torch.ones(n) / 7], 1)
    for items in (captions, weighted):
        difference, low, high = confidence.paired_difference(items, items)
        assert difference == 0 and low < -0.002 and high > 0.002

    # A rank is no share: its difference keeps the bootstrap.
    ranks = torch.tensor([[3.0, 1.0]]).repeat(n, 1)
    assert confidence.paired_difference(ranks, ranks) == (0, 0, 0)


@pytest.mark.parametrize("captions", [1, 3])
def test_the_posterior_covers_as_often_as_it_says(captions, monkeypatch):
    monkeypatch.setattr(confidence, "DRAWS", 2000)
    generator = torch.Generator().manual_seed(0)
    covered = []
    for trial in range(200):
        a = (torch.rand(40, captions, generator=generator) < 0.6).double()
        b = torch.where(torch.rand(40, captions, generator=generator) < 0.2, 1 - a, a)
        denominator = torch.full((40,), captions, dtype=torch.float64)
        sides = [torch.stack([hits.sum(1), denominator], 1) for hits in (a, b)]
        low, high = confidence.paired_posterior(*sides, trial)
        covered.append(low <= 0.6 - (0.6 * 0.8 + 0.4 * 0.2) <= high)
    assert 0.9 <= sum(covered) / len(covered) <= 0.995


def test_the_worst_group_is_named_with_its_interval():
    hits = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0])
    worst = confidence.worst_group(hits, ["a", "a", "a", "b", "b", "b", "b", "b"])
    assert (worst.name, worst.n) == ("b", 5) and worst.accuracy == pytest.approx(2 / 5)
    assert worst.interval == confidence.wilson(2, 5)
    assert worst.gap == pytest.approx(2 / 3 - 2 / 5)


def test_the_worst_group_at_its_edges():
    """None of n, all of n, one picture in a group, one group: bounds stay sound and hold it."""
    groups = ["a"] * 6 + ["b"]
    cases = {
        (1, 1, 1, 1, 1, 1, 0): ("b", 0.0, (0.0, 0.7935), 1.0),
        (0, 0, 0, 0, 0, 0, 1): ("a", 0.0, (0.0, 0.3903), 1.0),
        (1, 1, 1, 1, 1, 1, 1): ("a", 1.0, (0.6097, 1.0), 0.0),
        (0, 0, 0, 0, 0, 0, 0): ("a", 0.0, (0.0, 0.3903), 0.0),
    }
    for hits, (name, accuracy, bounds, gap) in cases.items():
        worst = confidence.worst_group(torch.tensor(hits), groups)
        assert (worst.name, worst.accuracy, worst.gap) == (name, accuracy, gap)
        assert worst.interval == pytest.approx(bounds, abs=1e-4)
        assert worst.interval[0] <= accuracy <= worst.interval[1]
    assert len(cases) == 4
    assert confidence.worst_group(torch.tensor([1.0]), ["only"]).gap == 0

    # The bounds are 0 and 1 themselves, not a rounding beside them.
    for n in range(1, 400):
        assert confidence.wilson(0, n)[0] == 0 and confidence.wilson(n, n)[1] == 1, n


@pytest.mark.parametrize("spread", [1.0, 1e-4], ids=["float32", "float64 of a near collapse"])
def test_blocks_of_any_size_give_the_dense_ranks(monkeypatch, spread):
    centre = rows(1, seed=9)
    image, text = (
        torch.nn.functional.normalize(centre * (1 - spread) + spread * rows(n, seed=n), dim=1)
        for n in (41, 97)
    )
    # Equal rows in different blocks: ties must be counted the same way.
    image[[3, 40]] = image[17].clone()
    text[[0, 50, 96]] = text[20].clone()
    owner = torch.arange(97) % 41

    widths: list[int] = []
    precise = metrics._precise

    def noted(tie, *parts):
        widths.extend(map(len, parts))
        return precise(tie, *parts)

    monkeypatch.setattr(metrics, "_precise", noted)
    ranks = {}
    for n_rows, n_columns in ((1024, 4096), (8, 8), (13, 5), (1, 41)):
        monkeypatch.setattr(metrics, "TILE_ROWS", n_rows)
        monkeypatch.setattr(metrics, "TILE_COLUMNS", n_columns)
        widths.clear()
        image_rank, text_rank = metrics.retrieval_ranks(image, text, owner)
        ranks[n_rows, n_columns] = (image_rank.tolist(), text_rank.tolist())
        # No copy in float64 is larger than a block.
        assert max(widths) <= max(n_rows, n_columns)
    assert len(ranks) == 4 and len({str(value) for value in ranks.values()}) == 1
