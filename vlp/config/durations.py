"""Spans of training in the units that a configuration gives them in, and their step counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vlp.config.training import Train

_SAMPLES = {"samples": 1.0, "ksamples": 1e3, "Msamples": 1e6}


@dataclass(frozen=True)
class Duration:
    """A span of training in any unit: `1000` (steps), `5%` (of the run), `3ep` (epochs),
    `200ksamples`, `2Msamples`.
    """

    value: float
    unit: Literal["steps", "%", "ep", "samples"]

    @classmethod
    def from_config(cls, value: Any) -> Duration:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(%|ep|samples|ksamples|Msamples)?", str(value))
        if not match or isinstance(value, bool):
            raise ValueError(
                f"found {value!r}, expected a duration: "
                "1000 (steps), 5%, 3ep, 200ksamples or 2Msamples"
            )

        # A bare number counts steps.
        number, unit = float(match[1]), match[2] or "steps"
        if unit == "steps" and number != int(number):
            raise ValueError(f"found {value!r}, expected a whole number of steps")

        if unit in _SAMPLES:
            return cls(number * _SAMPLES[unit], "samples")
        return cls(number, unit)  # type: ignore[arg-type]  # one of the pattern's

    def to_config(self) -> str | int:
        """The text that `from_config` reads back."""
        if self.unit == "steps":
            return int(self.value)
        if self.unit == "samples":
            return f"{self.value / 1e3:.12g}ksamples"
        return f"{self.value:g}{self.unit}"

    def steps(self, *, batch: int, steps_per_epoch: int, total: int | None = None) -> int:
        """The span in optimiser steps of `batch` samples, at least 1 unless the value is 0; `%`
        needs `total` steps.
        """
        span = self.span(batch=batch, steps_per_epoch=steps_per_epoch, total=total)
        return max(1, round(span)) if span else 0

    def span(self, *, batch: int, steps_per_epoch: int, total: int | None = None) -> Fraction:
        """The span in steps before rounding; its multiples are rounded one by one, so that they do
        not drift.
        """
        if self.unit == "%" and total is None:
            raise ValueError(
                "a percentage has no meaning here; give steps, epochs (3ep) or samples (2Msamples)"
            )

        # Fractions, because a multiple of a rounded float can end on the wrong side of a step.
        per_unit = {
            "steps": Fraction(1),
            "ep": Fraction(steps_per_epoch),
            "samples": Fraction(1, batch),
            "%": Fraction(total or 0, 100),
        }
        return Fraction(str(self.value)) * per_unit[self.unit]


@dataclass(frozen=True)
class Plan:
    """The extent of a run in steps, by which durations become step counts."""

    batch: int  # global
    steps_per_epoch: int
    total: int  # steps of the whole run

    @classmethod
    def of(cls, train: Train, steps_per_epoch: int) -> Plan:
        """The extent of a run of train.duration."""
        # Before there is a total, so a percentage has no meaning here.
        total = train.duration.steps(batch=train.batch, steps_per_epoch=steps_per_epoch)
        return cls(train.batch, steps_per_epoch, total)

    def steps(self, duration: Duration) -> int:
        """A duration in steps of this run."""
        return duration.steps(
            batch=self.batch, steps_per_epoch=self.steps_per_epoch, total=self.total
        )

    def due(self, every: Duration | None, step: int) -> bool:
        """Whether something done `every` so often is due after `step` updates: see `due_steps`."""
        if step == self.total or every is None:
            return step == self.total

        span, n_multiples = self._multiples(every)
        if span <= 1:
            return True

        # Rounding moves a multiple by half a step at most, so only the nearest can be `step`.
        nearest = round(step / span)
        near = range(max(1, nearest - 1), min(nearest + 1, n_multiples) + 1)
        return any(round(k * span) == step for k in near)

    def due_steps(self, every: Duration | None) -> list[int]:
        """The steps after which something done `every` so often is due: the rounded multiples of
        the span, and the end.

        A multiple in per cent that falls short of the end by less than a tenth of the span (33%
        three times) is the end itself, so that nothing is done twice within a few steps.
        """
        if every is None:
            return [self.total]

        span, n_multiples = self._multiples(every)
        if span <= 1:
            return list(range(1, self.total + 1))
        multiples = {round(k * span) for k in range(1, n_multiples + 1)}
        return sorted(multiples | {self.total})

    def _multiples(self, every: Duration) -> tuple[Fraction, int]:
        """The span of `every` in steps, and how many of its multiples lie within the run."""
        span = every.span(batch=self.batch, steps_per_epoch=self.steps_per_epoch, total=self.total)
        if not span:  # 0%: after every step
            return Fraction(1), self.total
        end = Fraction(self.total)
        if every.unit == "%":
            end -= span / 10
        return span, int(end / span)
