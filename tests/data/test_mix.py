"""Order: permutations are bijections that look random, epochs are whole, shares are kept."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlp.data.mix import Mixture
from vlp.data.permutation import Windows, permute
from vlp.data.sources import Common
from vlp.types import Sample


class Numbers:
    """A source of n samples without content."""

    n_left_out = n_negatives = n_counterfactuals = window = reserve = 0
    labels = frozenset()

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        return Sample(i, f"k{i}", b"", "png", ("x",))


def mixture(*sizes: int, weights: list[float] | None = None, **options) -> Mixture:
    return Mixture(
        [Numbers(n) for n in sizes],
        weights or [None] * len(sizes),
        **{"seed": 5, "shuffle": True, **options},
    )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 63, 64, 65, 100, 255, 257, 1000, 4097])
def test_permutations_are_bijections_and_depend_on_the_key(n):
    one, two = (permute(n, key, np.arange(n)) for key in (1, 2))
    assert sorted(one.tolist()) == list(range(n)) == sorted(two.tolist())
    if n > 16:
        assert one.tolist() != two.tolist() != list(range(n))
    some = np.array([n - 1, 0, n // 2])
    assert permute(n, 1, some).tolist() == one[some].tolist()


def test_permutations_look_random():
    n, trials = 50, 4000
    drawn = np.stack([permute(n, key, np.arange(n)) for key in range(trials)])
    expected = trials / n
    for i in (
        0,
        1,
        17,
        49,
    ):  # where an element goes: chi-square with 49 degrees of freedom, mean 49, deviation 9.9
        counts = np.bincount(drawn[:, i], minlength=n)
        assert 20 < ((counts - expected) ** 2 / expected).sum() < 95
    # Neighbours stay neighbours no more than others.
    steps = np.bincount((drawn[:, 1] - drawn[:, 0]) % n, minlength=n)[1:]
    expected = trials / (n - 1)
    assert 20 < ((steps - expected) ** 2 / expected).sum() < 95

    order = permute(100_000, 3, np.arange(100_000))
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.015
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.015


@pytest.mark.parametrize(
    ("sizes", "batch"), [((10,), 3), ((64,), 64), ((7, 1, 40), 5), ((1000, 3), 17)]
)
def test_an_epoch_holds_every_sample_at_most_once_and_leaves_out_the_remainder_only(sizes, batch):
    mix, n = mixture(*sizes), sum(sizes)
    steps = n // batch
    left_out = []
    for epoch in range(4):
        ids = np.concatenate([mix.batch(epoch * steps + s, batch) for s in range(steps)])
        assert (
            len(set(ids.tolist())) == len(ids) == n - n % batch and ids.min() >= 0 and ids.max() < n
        )
        left_out.append(frozenset(range(n)) - set(ids.tolist()))
    if n % batch and n > 20:
        assert len(set(left_out)) > 1  # other ones each epoch


def test_without_shuffling_the_order_is_the_stored_one():
    mix = mixture(4, 3, shuffle=False)
    assert [mix.batch(s, 3).tolist() for s in range(4)] == [
        [0, 1, 2],
        [3, 4, 5],
        [0, 1, 2],
        [3, 4, 5],
    ]


def test_seeds_and_epochs_differ_and_steps_repeat():
    a, b = mixture(1000), mixture(1000, seed=6)
    assert a.batch(0, 100).tolist() == a.batch(0, 100).tolist() != b.batch(0, 100).tolist()
    assert a.batch(0, 100).tolist() != a.batch(10, 100).tolist()


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.2, 0.1], [1, 1, 1], [5.0, 0.001, 2.5], [3e-7, 1e-7, 6e-7], [1, 3, 1e-300]],
)
def test_weights_are_kept_to_one_draw_and_each_source_runs_in_whole_epochs(weights):
    sizes, size = (30, 200, 11), 16
    mix = mixture(*sizes, weights=weights)
    ids = np.concatenate([mix.batch(step, size) for step in range(400)])
    source = np.searchsorted(mix.firsts, ids, side="right") - 1
    for s, weight in enumerate(weights):
        share = weight / sum(weights)
        seen = np.cumsum(source == s)
        assert np.abs(seen - share * np.arange(1, len(ids) + 1)).max() <= len(sizes)

        own = ids[source == s]
        for start in range(0, len(own) - sizes[s] + 1, sizes[s]):
            assert len(set(own[start : start + sizes[s]].tolist())) == sizes[s]


def test_weights_are_given_to_all_sources_or_none():
    with pytest.raises(ValueError, match="every source a weight, or none"):
        mixture(3, 4, weights=[0.5, None])


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(ValueError, match=f"weight is {weight}; expected a positive number"):
        Common(weight=weight)


def test_stand_ins_come_from_the_same_source_and_never_meet():
    mix = mixture(500, 80)
    ids = mix.batch(0, 64)
    used = Counter()
    for row in range(64):
        stand_ins = mix.replacements(int(ids[row]), 0, row, ids)
        for _, sample_id in zip(range(3 if ids[row] < 500 else 1), stand_ins):
            assert sample_id not in ids and mix.source_of(sample_id) == mix.source_of(int(ids[row]))
            used[sample_id] += mix.source_of(sample_id) == 0
    assert max(used.values()) == 1


def test_stand_ins_exist_even_when_the_batch_is_the_whole_source():
    mix = mixture(8)
    ids = mix.batch(0, 8)
    found = [i for _, i in zip(range(7), mix.replacements(int(ids[2]), 0, 2, ids))]
    assert len(found) == 7 and int(ids[2]) not in found


def test_a_billion_samples_cost_nothing():
    ids = mixture(10**9).batch(123_456, 4096)
    assert len(set(ids.tolist())) == 4096 and ids.max() < 10**9


@pytest.mark.parametrize("runs", [[10] * 30, [1, 100, 3, 0, 0, 57, 9], [5], [7, 7]])
@pytest.mark.parametrize("width", [1, 3, 50])
def test_windows_permute_all_samples_and_keep_to_a_few_shards_at_a_time(runs, width):
    runs = np.array(runs)
    n, bounds = runs.sum(), np.cumsum(runs)
    order = Windows(runs, width, 1)(np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    assert Windows(runs, width, 1)(np.array([n - 1, 0])).tolist() == [order[-1], order[0]]

    shard = np.searchsorted(bounds, order, side="right")
    last_use = {s: np.flatnonzero(shard == s).max() for s in set(shard.tolist())}
    first_use = {s: np.flatnonzero(shard == s).min() for s in set(shard.tolist())}
    for position in range(n):
        assert sum(first_use[s] <= position <= last_use[s] for s in last_use) <= width
    if n > 100:
        assert Windows(runs, width, 2)(np.arange(n)).tolist() != order.tolist()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 3.0]])
def test_a_source_without_samples_is_named(weights):
    with pytest.raises(ValueError, match="source 1 holds no samples; leave it out"):
        mixture(5, 0, 3, weights=weights)
