"""Batches of several sizes in one run: no sample of an epoch is lost or repeated at a joint."""

import random
from itertools import chain

import numpy as np
import pytest

from tests.data.test_mix import mixture
from vlp.data.mix import Begin


def walk(mix, phases):
    """The ids of every step over (steps, size) phases, with each phase's begin entered in turn."""
    step, batches = 0, []
    for n_steps, size in phases:
        batches += [mix.batch(step + i, size).tolist() for i in range(n_steps)]
        step += n_steps
        mix.begin(mix.end(step, size))
    return batches


def joined(batches):
    return list(chain.from_iterable(batches))


def test_every_epoch_holds_each_sample_once_whatever_the_sizes():
    """Over random data and phases: within an epoch no id twice, and less than a batch left."""
    chance, n_epochs = random.Random(1), 0
    for _ in range(80):
        n = chance.randrange(5, 60)
        phases = [(chance.randrange(1, 9), chance.randrange(1, min(n, 12) + 1)) for _ in range(4)]
        mix = mixture(n)
        step, drawn = 0, {}
        for n_steps, size in phases:
            for _ in range(n_steps):
                epoch, place = divmod(mix._first_draw(step, size), n)
                assert place + size <= n
                drawn.setdefault(epoch, []).append((place, mix.batch(step, size).tolist()))
                step += 1
            mix.begin(mix.end(step, size))

        largest = max(size for _, size in phases)
        for epoch, batches in drawn.items():
            ids = [i for _, batch in batches for i in batch]
            assert len(set(ids)) == len(ids)
            # One after another, without a gap; what is left at a closed epoch's end fills no batch.
            assert [place for place, _ in batches] == np.cumsum(
                [0, *(len(batch) for _, batch in batches[:-1])]
            ).tolist()
            if epoch + 1 in drawn:
                assert n - len(ids) < largest
                n_epochs += 1
    assert n_epochs > 60


def test_phases_of_one_size_are_the_plain_sequence():
    plain = mixture(25)
    expected = [plain.batch(step, 4).tolist() for step in range(20)]
    assert walk(mixture(25), [(6, 4), (3, 4), (11, 4)]) == expected
    assert walk(mixture(25), [(6, 4), (14, 5)])[:6] == expected[:6]


def test_an_epoch_goes_on_with_the_other_size():
    ids = joined(walk(mixture(24), [(3, 4), (1, 12)]))
    assert sorted(ids) == list(range(24))
    # A remainder too small for the first size is used by the second.
    ids = joined(walk(mixture(10), [(2, 4), (1, 2)]))
    assert sorted(ids) == list(range(10))


@pytest.mark.parametrize("size", [8, 6])
def test_weighted_sources_keep_their_shares_over_a_joint(size):
    mix = mixture(25, 15, weights=[0.75, 0.25])
    ids = joined(walk(mix, [(5, 4), (10, size)]))
    of_second = [i >= 25 for i in ids]
    # To within one draw of its share after any number of draws.
    for n in range(1, len(ids) + 1):
        assert abs(sum(of_second[:n]) - n / 4) <= 1
    assert mix._begin == Begin(15, len(ids))
