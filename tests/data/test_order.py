"""The order of samples: any rows of a step by themselves are those of the whole step, equal to a
plain reference that lists everything, and those of runs that began with earlier versions.
"""

from __future__ import annotations

import hashlib
import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tests.data.material import IMAGE, TEXT, data_of, encoded, picture
from tests.data.test_mix import Numbers
from vlp.data.deal import Deal
from vlp.data.mix import Begin, Mixture
from vlp.data.permutation import permute, permute_each
from vlp.data.steps import Steps
from vlp.data.units import CaptionsOfSamples
from vlp.seeds import derive
from vlp.types import Sample

# Of the batches of `trials()`, made before a process computed its own rows only.
ORDER_SHA256 = "e6542053872e749b63025a8ad4580a1d2ce3a2f980d1c7df2d0e2d67eddd3036"
N_TRIALS = 60


class Sampled(Numbers):
    """A source of samples with one to three captions, three of an origin."""

    runs = None

    def n_captions(self) -> np.ndarray:
        return np.arange(self.n) % 3 + 1

    def origins(self) -> np.ndarray:
        return np.arange(self.n) // 3


class Windowed(Sampled):
    """A source whose shards of seven samples are fetched whole."""

    def __init__(self, n: int, window: int) -> None:
        super().__init__(n)
        self.window = window
        self.runs = np.diff([*range(0, n, 7), n])


def trials(n_trials: int = N_TRIALS):
    """(mixture, rows of a step, some steps) of many kinds, the same in every call."""
    chance = random.Random(19)
    for trial in range(n_trials):
        n_sources = chance.randint(1, 5)
        large = chance.random() < 0.2
        sizes = [chance.choice([10, 57, 300, 1000]) for _ in range(n_sources)]
        if large:
            sizes = [chance.randint(10**6, 5 * 10**9) for _ in range(n_sources)]

        sources: list[Numbers] = [Sampled(n) for n in sizes]
        options = chance.choice([{}, {"together": 3}, {"every_caption": True}, {"windows": True}])
        if large:  # whose captions and origins would be listed
            options = chance.choice([{}, {"replacement": True}])
        if options.pop("windows", False):
            sources = [Windowed(n, chance.randint(1, 4)) for n in sizes]

        weights: list[float | None] = [None] * n_sources
        if chance.random() < 0.6:
            weights = [chance.choice([1, 0.3, 1 / 7, 1 / 32, 1e-4, 2.5]) for _ in sizes]
        mix = Mixture(sources, weights, seed=trial, shuffle=chance.random() < 0.9, **options)

        size = options.get("together", 1) * chance.randint(2, 9)
        if not mix.steps_per_epoch(size):
            size = options.get("together", 1)
        if chance.random() < 0.3:  # a run whose batch changed at step 5
            mix.begin(mix.end(5, size))
        yield mix, size, [5, 6, 7, chance.randint(8, 10**7)]


def test_the_order_is_that_of_runs_that_began_earlier():
    digest = hashlib.sha256()
    n_batches = 0
    for mix, size, steps in trials():
        for step in steps:
            digest.update(mix.batch(step, size).tobytes())
            n_batches += 1
    assert n_batches == 4 * N_TRIALS
    assert digest.hexdigest() == ORDER_SHA256


def test_rows_of_any_ranks_and_processes_are_those_of_the_whole_step():
    chance = random.Random(3)
    n_cuts = n_within_groups = 0
    for mix, size, steps in trials():
        for step in steps:
            whole = mix.rows(step, size, range(size))
            # Every step is cut anew, as where ranks and processes change in mid-epoch.
            cuts = sorted({0, size, *(chance.randint(0, size) for _ in range(3))})
            parts = [mix.rows(step, size, range(*cut)) for cut in pairwise(cuts)]
            assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
            assert (whole.captions is None) == (not mix.every_caption)
            if mix.every_caption:
                captions = np.concatenate([part.captions for part in parts])
                assert np.array_equal(captions, whole.captions)
            n_cuts += len(cuts) - 2
            n_within_groups += sum(cut % mix.together > 0 for cut in cuts)
    assert n_cuts > 300 and n_within_groups > 20


def naive_rows(sizes: list[int], shares: list[float] | None, seed: int, size: int, n_steps: int):
    """The samples of the first steps, draw by draw: every permutation listed, every share counted
    with fractions.
    """

    def listed(stream: int, n: int, epoch: int) -> list[int]:
        return permute(n, derive(seed, "order", stream, epoch), np.arange(n)).tolist()

    firsts = [sum(sizes[:s]) for s in range(len(sizes))]
    total = sum(sizes)
    if shares is None:
        per_epoch = total // size
        for step in range(n_steps):
            epoch, place = divmod(step, per_epoch)
            yield listed(0, total, epoch)[place * size : (place + 1) * size]
        return

    fractions = [Fraction(share).limit_denominator(10**6) for share in shares]
    of_all = sum(fractions)
    whole_first = sorted(
        range(len(sizes)), key=lambda s: (fractions[s] / of_all * size).denominator > 1
    )
    drawn = [0] * len(sizes)
    ids = []
    for x in range(1, n_steps * size + 1):
        left, left_share = Fraction(x), of_all
        for s in whole_first:
            due = left * fractions[s] / left_share // 1
            left, left_share = left - due, left_share - fractions[s]
            if due > drawn[s]:
                epoch, place = divmod(drawn[s], sizes[s])
                ids.append(firsts[s] + listed(s + 1, sizes[s], epoch)[place])
                drawn[s] += 1
                break
    for step in range(n_steps):
        yield ids[step * size : (step + 1) * size]


@pytest.mark.parametrize(
    ("sizes", "shares", "size"),
    [
        ([23], None, 4),
        ([9, 1, 14], None, 5),
        ([5], [2.0], 3),
        ([30, 7, 11], [0.5, 0.25, 0.25], 8),
        ([13, 29, 3], [0.7, 0.2, 0.1], 7),
        ([4, 50, 6, 8], [1 / 3, 1 / 7, 1 / 32, 1e-3], 32),
    ],
)
def test_the_whole_order_is_that_of_a_plain_reference(sizes, shares, size):
    n_steps = 12
    mix = Mixture([Numbers(n) for n in sizes], shares or [None] * len(sizes), seed=4)
    rank_of_two = range(size // 2, size)
    expected = list(naive_rows(sizes, shares, 4, size, n_steps))
    assert [len(ids) for ids in expected] == [size] * n_steps
    for step, ids in enumerate(expected):
        assert mix.batch(step, size).tolist() == ids
        assert mix.rows(step, size, rank_of_two).samples.tolist() == ids[size // 2 :]


def test_rows_cost_nothing_of_a_step_that_no_memory_holds():
    n, size = 5 * 10**9, 10**12
    weighted = Mixture([Numbers(n) for _ in range(10)], [0.1 + s for s in range(10)], seed=1)
    rows = range(size // 3, size // 3 + 128)
    ids = weighted.rows(10**6, size, rows).samples
    sources = np.searchsorted(weighted.firsts, ids, side="right") - 1
    assert len(ids) == 128 and set(sources.tolist()) > {5, 6, 7, 8, 9}
    # Among neighbours, too, each source has its share.
    assert abs((sources == 9).sum() - 128 * 9.1 / 46) < 2


def test_sources_keep_their_share_of_every_batch_and_of_all_draws():
    deal = Deal([Fraction(1, 32), Fraction(3, 8), Fraction(19, 32)], 256)
    for first in (0, 256, 256 * 10**13):
        source, count = deal(first, 256)
        assert np.bincount(source).tolist() == [8, 96, 152]
        assert count[source == 0].tolist() == list(range(first // 32, first // 32 + 8))


def test_shares_of_many_digits_are_dealt_exactly():
    """Products of their parts exceed 64 bits, of a few draws as of many."""
    chance = random.Random(5)
    shares = [Fraction(chance.random()).limit_denominator(10**6) for _ in range(9)]
    deal = Deal(shares, 100)
    assert max(denominator for _, _, denominator in deal.turns) > 2**63

    for first in (0, 10**6, 10**12):
        source, count = deal(first, 50)
        one_by_one = [deal(first + i, 1) for i in range(50)]
        assert source.tolist() == [int(of_draw[0]) for of_draw, _ in one_by_one]
        assert count.tolist() == [int(before[0]) for _, before in one_by_one]

        due = [Fraction(first + i) * shares[s] / sum(shares) for i, s in enumerate(source)]
        assert max(abs(before - share) for before, share in zip(count.tolist(), due)) <= 9


def test_several_permutations_at_once_are_each_by_itself():
    sizes, keys = [1, 2, 3, 100, 4097, 5 * 10**9], [7, 8, 9, 7, 10, 11]
    which = np.repeat(np.arange(6), 40)
    places = np.array([i % min(sizes[w], 37) for i, w in enumerate(which)])
    together = permute_each(sizes, keys, which, places)
    for w in range(6):
        here = which == w
        assert together[here].tolist() == permute(sizes[w], keys[w], places[here]).tolist()


class Captioned(Numbers):
    """A source of which sample i has counts[i] captions."""

    def __init__(self, counts: np.ndarray) -> None:
        super().__init__(len(counts))
        self.counts = counts

    def n_captions(self) -> np.ndarray:
        return self.counts


def test_captions_are_found_by_number_in_a_byte_a_sample():
    """Of few samples and of many, of samples without captions, and of more than a byte counts."""
    chance = np.random.default_rng(7)
    n_cases = 0
    for n, most in ((1, 1), (63, 3), (64, 5), (65, 255), (1000, 300), (40_000, 5)):
        counts = chance.integers(0, most + 1, n)
        counts[-1] = most
        units = CaptionsOfSamples(Captioned(counts.astype(np.min_scalar_type(most))))
        samples, captions = units.rows(np.arange(len(units)), 0, np.zeros(len(units)))
        assert samples[:, 0].tolist() == np.repeat(np.arange(n), counts).tolist()
        ends = np.cumsum(counts)
        before = ends - counts
        assert captions[:, 0].tolist() == (np.arange(ends[-1]) - np.repeat(before, counts)).tolist()
        assert units.before(np.arange(n + 1)).tolist() == [*before.tolist(), ends[-1]]
        n_cases += 1
        if most <= 255:
            assert units._counts.nbytes + units._ends.nbytes <= 1.2 * n + 200
    assert n_cases == 6


def test_a_changed_batch_goes_on_where_the_epoch_stood():
    mix = Mixture([Numbers(1000)], [None], seed=2)
    before = [mix.batch(step, 30) for step in range(10)]
    mix.begin(mix.end(10, 30))
    after = [mix.rows(step, 70, range(70)).samples for step in range(10, 20)]
    assert len(set(np.concatenate(before + after).tolist())) == 1000
    assert mix.end(10, 30) == Begin(10, 300)


def at_joint(shares: list[Fraction], first_size: int, n_steps: int, second_size: int) -> list[int]:
    """Of each source: how many of its draws come twice, or are passed over (below 0), where batches
    of another size begin.
    """
    joint = first_size * n_steps
    sources, counts = Deal(shares, first_size)(0, joint)
    later_sources, later_counts = Deal(shares, second_size)(joint, 50 * second_size)
    repeated = []
    for s in range(len(shares)):
        n_before = int((sources == s).sum())
        assert counts[sources == s].tolist() == list(range(n_before))
        after = later_counts[later_sources == s]
        repeated.append(n_before - int(after[0]))
        assert after.tolist() == list(range(after[0], after[0] + len(after)))
    return repeated


def test_where_a_weighted_batch_changes_a_source_goes_on_within_fewer_draws_than_sources():
    """Behind its last draw where its share of both batches is a whole number of draws."""
    chance = random.Random(1)
    n_cases = n_off = 0
    for _ in range(200):
        weights = [chance.choice([1, 2, 3, 4, 6, 8, 12]) for _ in range(chance.randint(2, 5))]
        shares = [Fraction(weight) for weight in weights]
        first_size, second_size = chance.randint(2, 40), chance.randint(2, 40)
        repeated = at_joint(shares, first_size, chance.randint(1, 9), second_size)
        assert max(map(abs, repeated)) < len(shares)
        n_off += any(repeated)

        total = sum(weights)
        assert not any(at_joint(shares, 2 * total, 3, 5 * total))
        n_cases += 1
    assert n_cases == 200 and n_off > 3


def test_of_any_first_draws_a_source_is_hardly_behind_and_little_ahead():
    chance = random.Random(2)
    n_cases = 0
    for _ in range(100):
        shares = [Fraction(chance.randint(1, 40)) for _ in range(chance.randint(2, 9))]
        sources, _ = Deal(shares, chance.randint(1, 64))(0, 500)
        for s, share in enumerate(shares):
            due = np.arange(1, 501) * float(share / sum(shares))
            ahead = np.cumsum(sources == s) - due
            assert ahead.min() > -1 and ahead.max() < len(shares) - 1 + 1e-9
            n_cases += 1
    assert n_cases > 300


class Pictures(Numbers):
    """A source whose samples all have one picture, and none whose number ends in 7."""

    PNG = encoded(picture(1, (8, 8)))

    def __getitem__(self, i: int) -> Sample:
        return Sample(i, f"k{i}", b"" if i % 10 == 7 else self.PNG, "png", ("x",))


class Listing(Mixture):
    """A mixture that tells how many whole steps it listed."""

    n_listed = 0

    def batch(self, step: int, size: int) -> np.ndarray:
        self.n_listed += 1
        return super().batch(step, size)


def test_a_process_lists_the_whole_step_only_for_stand_ins(tmp_path):
    mix = Listing([Pictures(10**6)], [None], seed=1)
    data = data_of(tmp_path)
    steps = Steps(mix, data, IMAGE, TEXT, 4000, rank=3, world=1000, widths={}, pixels=True)

    n_replaced = n_steps_with_bad = 0
    for step in range(12):
        batch, report = steps[step]
        wanted = mix.rows(step, 4000, steps.rows).samples
        bad = wanted % 10 == 7
        assert batch.sample_id[~bad].tolist() == wanted[~bad].tolist()
        whole = set(Mixture.batch(mix, step, 4000).tolist())
        assert not whole & set(batch.sample_id[bad].tolist()) and len(report.bad) >= bad.sum()
        n_replaced += int(bad.sum())
        n_steps_with_bad += bool(bad.any())
    assert n_replaced > 2 and 0 < n_steps_with_bad < 12
    assert mix.n_listed == n_steps_with_bad
