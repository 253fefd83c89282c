"""Lanes: every sample once an epoch, an order that no number of ranks changes, and shards that each
node fetches for itself.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tests.data.test_order import Sampled, Windowed
from vlp.data.lanes import Stretches, draws_at
from vlp.data.mix import Mixture
from vlp.data.permutation import Windows

N_TRIALS = 24


def listed(first: int, n: int, n_lanes: int) -> list[int]:
    """A batch's draws in the order of its rows, written down lane by lane."""
    draws = range(first, first + n)
    return [draw for lane in range(n_lanes) for draw in draws if draw % n_lanes == lane]


def test_the_rows_of_a_batch_are_its_draws_lane_by_lane():
    chance = random.Random(1)
    for _ in range(300):
        first, n, n_lanes = chance.randint(0, 50), chance.randint(1, 40), chance.randint(1, 12)
        expected = listed(first, n, n_lanes)
        assert draws_at(np.arange(n), first, n, n_lanes).tolist() == expected
        cut = chance.randint(0, n - 1)
        assert draws_at(np.arange(cut, n), first, n, n_lanes).tolist() == expected[cut:]
    far = draws_at(np.array([5 * 10**11]), 10**15 + 1, 10**12, 64)
    assert far[0] % 64 == 32


def test_one_lane_is_the_order_without_lanes():
    """Empty shards count in a window, as they did before there were lanes."""
    chance = random.Random(2)
    for _ in range(100):
        runs = np.array([chance.choice([0, 1, 5, 9]) for _ in range(chance.randint(1, 20))])
        width, last = chance.randint(1, 6), len(runs) - 1
        ends = np.cumsum(runs)
        before = ends[[*range(width - 1, last, width), last]]
        stretches = Stretches(int(ends[-1]), 1)
        assert stretches.window_ends(ends, width).tolist() == before.tolist()
        assert stretches.positions(np.arange(ends[-1])).tolist() == list(range(ends[-1]))


def test_windows_of_lanes_are_a_permutation_of_all_samples():
    chance = random.Random(3)
    for trial in range(60):
        runs = np.array([chance.choice([0, 1, 5, 9, 40]) for _ in range(chance.randint(1, 30))])
        n = int(runs.sum())
        windows = Windows(runs, chance.randint(1, 5), trial, chance.randint(1, 40))
        assert sorted(windows(np.arange(n)).tolist()) == list(range(n))


def mixtures():
    """(mixture, rows of a step) of sources whose shards no lane, window or batch divides."""
    chance = random.Random(4)
    for trial in range(N_TRIALS):
        sizes = [chance.choice([3, 7, 50, 300, 997]) for _ in range(chance.randint(1, 3))]
        sources = [Windowed(n, chance.randint(1, 9)) for n in sizes]
        if len(sources) > 1 and chance.random() < 0.5:
            sources[0] = Sampled(sizes[0])
        options = chance.choice([{}, {}, {"together": 3}, {"every_caption": True}])
        weights = [None] * len(sizes)
        if chance.random() < 0.4:
            weights = [chance.choice([1, 0.3, 1 / 7, 2.5]) for _ in sizes]
        lanes = chance.choice([1, 2, 3, 8, 64])
        try:
            mix = Mixture(sources, weights, seed=trial, lanes=lanes, **options)
        except ValueError:  # a source too small for groups
            mix = Mixture(sources, weights, seed=trial, lanes=lanes)
        # Some twenty steps of an epoch, odd sizes among them.
        size = mix.together * max(1, mix.n_units // 20 + chance.randint(-3, 3))
        if mix.steps_per_epoch(size):
            yield mix, size


def test_every_unit_stands_once_in_an_epoch_at_any_number_of_lanes():
    n_epochs = 0
    for mix, size in mixtures():
        if mix.shares is not None or mix.together > 1:
            continue
        n_steps = mix.steps_per_epoch(size)
        for epoch in range(2):
            steps = range(epoch * n_steps, (epoch + 1) * n_steps)
            rows = [mix.rows(step, size, range(size)) for step in steps]
            drawn = np.concatenate([r.samples for r in rows]).tolist()
            if mix.every_caption:
                drawn = list(zip(drawn, np.concatenate([r.captions for r in rows]).tolist()))
            assert len(set(drawn)) == len(drawn) == n_steps * size
            n_epochs += 1
    assert n_epochs > 12


def test_weighted_sources_run_in_whole_rounds_and_keep_their_share_of_each_batch():
    n_batches = 0
    for lanes in (2, 8, 7):
        sources = [Windowed(1400, 4), Windowed(333, 4), Sampled(97)]
        mix = Mixture(sources, [0.5, 0.37, 0.13], seed=1, lanes=lanes)
        seen: Counter[int] = Counter()
        for step in range(60):
            batch = mix.batch(step, 40)
            seen.update(batch.tolist())
            shares = np.bincount(np.searchsorted(mix.firsts, batch, side="right") - 1, minlength=3)
            # Lanes that do not divide the batch have one draw more or less.
            slack = 1 if 40 % lanes == 0 else lanes
            assert np.abs(shares - 40 * np.array([0.5, 0.37, 0.13])).max() <= slack
            n_batches += 1
        rounds = [[seen[i] for i in range(*mix.firsts[s : s + 2])] for s in range(3)]
        assert all(max(times) - min(times) <= 2 for times in rounds)
        assert max(rounds[0]) == 1 and sum(map(sum, rounds)) == 2400
    assert n_batches == 180


def test_rows_of_any_ranks_are_those_of_the_whole_step_in_lanes():
    n_compared = 0
    for mix, size in mixtures():
        for step in (1, 10**6):
            whole = mix.rows(step, size, range(size)).samples
            for world in (2, min(size, 7)):
                cuts = [r * size // world for r in range(world + 1)]
                parts = [mix.rows(step, size, range(a, b)).samples for a, b in pairwise(cuts)]
                assert np.array_equal(np.concatenate(parts), whole)
                n_compared += 1
    assert n_compared > 60


def test_a_batch_that_changes_in_mid_epoch_loses_nothing_in_lanes():
    for lanes, sizes in ((8, (32, 56)), (8, (30, 70)), (3, (25, 64))):
        mix = Mixture([Windowed(1000, 8)], [None], seed=2, lanes=lanes)
        before = [mix.batch(step, sizes[0]) for step in range(10)]
        mix.begin(mix.end(10, sizes[0]))
        left = (1000 - 10 * sizes[0]) // sizes[1]
        after = [mix.batch(step, sizes[1]) for step in range(10, 10 + left)]
        drawn = np.concatenate(before + after)
        assert len(set(drawn.tolist())) == len(drawn) == 10 * sizes[0] + left * sizes[1]


@pytest.mark.parametrize("weights", [[None], [None, None], [0.7, 0.3]])
def test_a_rank_meets_its_share_of_the_shards_only(weights):
    mix = Mixture([Windowed(7 * 120, 8) for _ in weights], weights, seed=1, lanes=8)
    n_steps = 840 // 40

    def n_met(world: int) -> int:
        """The shards that all ranks meet, counted for each of them."""
        n_shards = 0
        for rank in range(world):
            rows = range(rank * 40 // world, (rank + 1) * 40 // world)
            ids = np.concatenate([mix.rows(step, 40, rows).samples for step in range(n_steps)])
            n_shards += len(set((ids // 7).tolist()))
        return n_shards

    alone = n_met(1)
    assert alone >= 120
    for world in (2, 4, 8):
        # Two ranks have a shard at the border of their lanes.
        assert n_met(world) <= alone + (world - 1) * len(weights)


class Large(Windowed):
    """Shards of 400 samples."""

    def __init__(self, n_shards: int) -> None:
        super().__init__(400 * n_shards, 4)
        self.runs = np.full(n_shards, 400)
        self.lost: set[int] = set()

    def is_lost(self, i: int) -> bool:
        return i // 400 in self.lost


@pytest.mark.parametrize(
    ("n_shards", "lanes", "size", "together"),
    [(3, 8, 48, 1), (1, 8, 48, 1), (9, 3, 36, 1), (7, 4, 42, 3)],
)
def test_stand_ins_of_their_shard_never_meet(n_shards, lanes, size, together):
    """Also where a shard is of many lanes, or a lane has rows more than another."""
    mix = Mixture([Large(n_shards)], [None], seed=3, lanes=lanes, together=together)
    n_replaced = 0
    for step in range(mix.steps_per_epoch(size)):
        batch = mix.batch(step, size)
        is_bad = batch % 3 == 1
        stand_ins = []
        for row in np.flatnonzero(is_bad).tolist():
            usable = (i for i in mix.replacements(int(batch[row]), step, row, batch) if i % 3 != 1)
            stand_ins.append(next(usable))
            assert stand_ins[-1] // 400 == batch[row] // 400
        assert len({*stand_ins, *batch[~is_bad].tolist()}) == size
        n_replaced += len(stand_ins)
    assert n_replaced > 100


def test_stand_ins_of_a_lost_shard_are_of_those_at_hand():
    """From anywhere, each sample of the lost shard would have another shard fetched."""
    source = Large(30)
    source.lost = {4, 11, 12}
    mix = Mixture([Sampled(500), source], [None, None], seed=3, lanes=4)
    n_replaced = n_steps_without = 0
    for step in range(mix.steps_per_epoch(48)):
        batch = mix.batch(step, 48)
        shards = np.where(batch < 500, -1, (batch - 500) // 400)
        is_bad = np.isin(shards, [*source.lost])
        if set(shards.tolist()) <= {-1, *source.lost}:
            n_steps_without += 1
            continue

        stand_ins = []
        for row in np.flatnonzero(is_bad | (shards >= 0) & (batch % 5 == 0)).tolist():
            usable = mix.replacements(int(batch[row]), step, row, batch)
            stand_ins.append(next(i for i in usable if is_bad[row] or i % 5))
            assert (stand_ins[-1] - 500) // 400 in set(shards.tolist()) - source.lost
        assert len({*stand_ins, *batch.tolist()}) == 48 + len(stand_ins)
        n_replaced += int(is_bad.sum())
    assert n_replaced > 600 and n_steps_without < 5
