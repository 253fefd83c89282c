"""A power law with a floor, of an error over model size, samples seen and batch.

    error(N, D, B) = floor + a·(N/N₀)^−α + b·(D/D₀)^−β·(B/B₀)^γ

N counts parameters without tables of tokens and positions, D samples seen, B the rows of a step.
A floor, a term of the model and a term of the data are the form that Hoffmann et al. 2022 fit to
losses of language models ("Training compute-optimal large language models", parametric loss
function); the factor of the batch is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

UNIT = {"parameters": 1e6, "samples": 24_000.0, "batch": 128.0}  # N₀, D₀, B₀
NAMES = ("floor", "a", "alpha", "b", "beta", "gamma")
LOWEST = np.array([0.0, 1e-6, 0.0, 1e-6, 0.0, -2.0])
HIGHEST = np.array([1.0, 10.0, 3.0, 10.0, 3.0, 2.0])
STARTS = [(0.05, 0.2, alpha, 0.5, beta, 0.0) for alpha in (0.2, 0.8) for beta in (0.2, 0.8)]
DRAWS = 300  # of the bootstrap


@dataclass(frozen=True)
class Point:
    """One trained model."""

    parameters: float
    samples: float
    batch: float
    error: float = math.nan  # measured, in (0, 1]


@dataclass(frozen=True)
class Law:
    """A fitted law and what its uncertainty is estimated from."""

    values: np.ndarray  # [6], in the order of NAMES
    residuals: np.ndarray  # [points] of log error, widened for the parameters that were fitted
    drawn: np.ndarray  # [DRAWS, 6] fitted to resampled residuals

    def __call__(self, point: Point) -> float:
        return float(errors(self.values, [point])[0])

    def interval(self, point: Point, seed: int = 0) -> tuple[float, float]:
        """Where 95 % of a new model's error are expected, its own noise included."""
        rng = np.random.default_rng(seed)
        fitted = np.array([errors(values, [point])[0] for values in self.drawn])
        noise = rng.choice(self.residuals, len(fitted))
        low, high = np.quantile(fitted * np.exp(noise), [0.025, 0.975])
        return float(low), float(high)

    def bounds(self, name: str) -> tuple[float, float]:
        """The middle 95 % of a parameter."""
        low, high = np.quantile(self.drawn[:, NAMES.index(name)], [0.025, 0.975])
        return float(low), float(high)

    @property
    def spread(self) -> float:
        """The root mean square of the relative residuals."""
        return float(np.sqrt(np.square(self.residuals).mean()))


def errors(values: np.ndarray, points: Sequence[Point]) -> np.ndarray:
    """[points] errors that a law of these parameters expects."""
    floor, a, alpha, b, beta, gamma = values
    size = np.array([point.parameters for point in points]) / UNIT["parameters"]
    samples = np.array([point.samples for point in points]) / UNIT["samples"]
    batch = np.array([point.batch for point in points]) / UNIT["batch"]
    return floor + a * size**-alpha + b * samples**-beta * batch**gamma


def fit(points: Sequence[Point], seed: int = 0) -> Law:
    """Fit by least squares of log errors from several starts, with a bootstrap of the residuals.

    ValueError for no more points than parameters, and for an error that has no logarithm.
    """
    if len(points) <= len(NAMES):
        raise ValueError(
            f"a law of {len(NAMES)} parameters needs more points than that, found {len(points)}"
        )
    measured = np.array([point.error for point in points])
    if not (measured > 0).all():
        raise ValueError(f"errors must be positive, found {measured.min()}: a score reached 100 %")

    logs = np.log(measured)
    fits = [_least_squares(points, logs, np.array(start)) for start in STARTS]
    best = min(fits, key=lambda one: one.cost).x

    # Fitted residuals are smaller than the noise, by the parameters that follow it.
    raw = logs - np.log(errors(best, points))
    residuals = (raw - raw.mean()) * math.sqrt(len(points) / (len(points) - len(NAMES)))
    rng = np.random.default_rng(seed)
    expected = np.log(errors(best, points))
    drawn = [
        _least_squares(points, expected + rng.choice(residuals, len(points)), best).x
        for _ in range(DRAWS)
    ]
    return Law(best, residuals, np.array(drawn))


def _least_squares(points: Sequence[Point], logs: np.ndarray, start: np.ndarray) -> OptimizeResult:
    # From strictly inside the bounds, as the solver wants it.
    margin = 1e-6 * (HIGHEST - LOWEST)
    inside = np.clip(start, LOWEST + margin, HIGHEST - margin)
    return least_squares(
        lambda values: np.log(errors(values, points)) - logs,
        inside,
        bounds=(LOWEST, HIGHEST),
        x_scale=np.array([0.1, 0.1, 0.3, 0.1, 0.3, 0.3]),
    )
