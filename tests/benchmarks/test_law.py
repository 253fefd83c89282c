"""The law is found again in points that follow it, and its intervals hold what they promise."""

import numpy as np
import pytest

from tests.benchmarks import law
from tests.benchmarks.law import Point

TRUE = np.array([0.1, 0.15, 0.6, 0.4, 0.7, 0.3])
GRID = [(n, d, 128) for n in (1e5, 4e5, 1e6) for d in (12e3, 24e3, 48e3)]
GRID += [(4e5, 24e3, batch) for batch in (64, 256, 512)]
NEXT = (Point(2e6, 48e3, 128), Point(1e6, 96e3, 128))


def noisy(deviation, seed):
    """The twelve runs, with a relative noise."""
    noise = np.exp(np.random.default_rng(seed).normal(0, deviation, len(GRID)))
    exact = law.errors(TRUE, [Point(*place) for place in GRID])
    return [Point(*place, error) for place, error in zip(GRID, exact * noise)]


def test_a_law_is_found_again_in_points_that_follow_it():
    fitted = law.fit(noisy(0.0, seed=0))
    assert fitted.spread < 1e-4
    assert fitted.values == pytest.approx(TRUE, abs=0.02)
    for point in NEXT:
        assert fitted(point) == pytest.approx(law.errors(TRUE, [point])[0], rel=1e-3)


def test_intervals_widen_with_the_noise_and_hold_the_truth(monkeypatch):
    monkeypatch.setattr(law, "DRAWS", 40)
    held, widths = [], []
    for seed in range(4):
        fitted = law.fit(noisy(0.02, seed))
        for point in NEXT:
            low, high = fitted.interval(point)
            held.append(low < law.errors(TRUE, [point])[0] < high)
            widths.append((high - low) / fitted(point))
    assert len(widths) == 8
    # 7.6 of 8 are expected of intervals at 95 %.
    assert held.count(True) >= 6
    assert min(widths) > 0.01
    assert max(widths) < 0.5


def test_too_few_points_and_errors_of_zero_are_refused():
    with pytest.raises(ValueError, match="needs more points"):
        law.fit(noisy(0.0, 0)[:6])
    perfect = [*noisy(0.0, 0), Point(1e6, 48e3, 128, 0.0)]
    with pytest.raises(ValueError, match="a score reached 100 %"):
        law.fit(perfect)
