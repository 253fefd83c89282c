"""Spans of training in the units that a configuration gives them in, and their step counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vlp.config.stages import Stage
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
    # of a stage: its first step, the one after its last (None: the run's end), and what the stages
    # before it have seen
    first: int = 0
    last: int | None = None
    epochs_before: Fraction = Fraction(0)
    samples_before: int = 0

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

    def last_steps(self, duration: Duration) -> int:
        """A duration in the last steps of this run."""
        return self.steps(duration)

    def due(self, every: Duration | None, step: int) -> bool:
        """Whether something done `every` so often is due after `step` updates: see `due_steps`."""
        if step == self.total or every is None:
            return step == self.total

        span, n_multiples = self._multiples(every)
        if span <= 1:
            return True

        # Rounding moves a multiple by half a step at most, so only the nearest can be `step`.
        shift = self._shift(every)
        nearest = round((step - shift) / span)
        near = range(max(1, nearest - 1), min(nearest + 1, n_multiples) + 1)
        return any(round(shift + k * span) == step for k in near)

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
        shift = self._shift(every)
        multiples = {round(shift + k * span) for k in range(1, n_multiples + 1)}
        return sorted(multiples | {self.total})

    def _multiples(self, every: Duration) -> tuple[Fraction, int]:
        """The span of `every` in steps, and how many of its multiples lie within the run."""
        span = every.span(batch=self.batch, steps_per_epoch=self.steps_per_epoch, total=self.total)
        if not span:  # 0%: after every step
            return Fraction(1), self.total
        end = Fraction(self.total)
        if every.unit == "%":
            end -= span / 10
        return span, int((end - self._shift(every)) / span)

    @property
    def end(self) -> int:
        """The step after which the stage is over, or the run, where it has none."""
        return self.total if self.last is None else self.last

    def _shift(self, every: Duration) -> Fraction:
        """Where the multiples of a span begin, in steps: a stage of other batches goes on with the
        epochs and samples of those before it.
        """
        if every.unit == "ep":
            return self.first - self.epochs_before * self.steps_per_epoch
        if every.unit == "samples":
            return self.first - Fraction(self.samples_before, self.batch)
        return Fraction(0)


@dataclass(frozen=True)
class WholePlan:
    """The extent of a run of stages: what is said in epochs or samples takes as many steps as the
    stages it falls into need for them.
    """

    parts: Sequence[Plan]  # of the stages, and of what follows them

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.parts[-1].total

    def steps(self, duration: Duration) -> int:
        """A duration in the first steps of the run."""
        return self._steps(duration, self.parts)

    def last_steps(self, duration: Duration) -> int:
        """A duration in the last steps of the run."""
        return self._steps(duration, self.parts[::-1])

    def _steps(self, duration: Duration, parts: Sequence[Plan]) -> int:
        """The steps of a span that begins with the first of `parts`; beyond the last one it goes on
        as there.
        """
        if duration.unit in ("steps", "%"):
            return parts[0].steps(duration)

        left, n_steps = Fraction(str(duration.value)), Fraction(0)
        for part in parts[:-1]:
            a_step = _a_step(duration, part.batch, part.steps_per_epoch)
            here = min(left / a_step, Fraction(part.end - part.first))
            n_steps += here
            left -= here * a_step
        n_steps += left / _a_step(duration, parts[-1].batch, parts[-1].steps_per_epoch)
        return max(1, round(n_steps)) if n_steps else 0


def of_stages(
    train: Train, stages: Sequence[Stage], steps_per_epoch: Callable[[int], int]
) -> list[Plan]:
    """The extents of a run's stages and of what follows them, one after another, by the steps of an
    epoch at a batch.

    Stages are measured in the unit of train.duration, each at its own batch: of 32 epochs a stage
    of 30 leaves two, whatever its steps come to. ValueError for stages beyond the whole, or shorter
    than half a step.
    """
    left = Fraction(str(train.duration.value))
    position, spans = Fraction(0), []
    for i, stage in enumerate(stages):
        batch = stage.batch or train.batch
        a_step = _a_step(train.duration, batch, steps_per_epoch(batch))
        if stage.duration.unit == "%":
            extent = Fraction(str(train.duration.value)) * Fraction(str(stage.duration.value)) / 100
        else:
            steps = stage.duration.span(batch=batch, steps_per_epoch=steps_per_epoch(batch))
            extent = steps * a_step
        left -= extent
        if left < 0:
            raise ValueError(
                f"stages.{i}.duration is {stage.duration.to_config()}, and with those before it "
                f"more than train.duration, {train.duration.to_config()}; shorten one, or raise it"
            )
        spans.append((batch, extent / a_step))

    # What is left is trained as configured; of a run without stages that is all of it.
    if left or not stages:
        a_step = _a_step(train.duration, train.batch, steps_per_epoch(train.batch))
        spans.append((train.batch, left / a_step))

    plans: list[Plan] = []
    first, epochs, samples = 0, Fraction(0), 0
    for i, (batch, span) in enumerate(spans):
        # Rounded where they end, so that lengths do not drift.
        position += span
        last = round(position)
        if last == first and i < len(stages):
            raise ValueError(
                f"stages.{i}.duration is {float(span):.2g} steps; give it one or more, or leave it "
                "out"
            )
        per_epoch = steps_per_epoch(batch)
        plans.append(Plan(batch, per_epoch, 0, first, last, epochs, samples))
        epochs += Fraction(last - first, per_epoch)
        samples += (last - first) * batch
        first = last

    # A rest of less than half a step is none; a run has one step at least.
    if len(plans) > 1 and plans[-1].first == plans[-1].last:
        plans.pop()
    total = max(1, first)
    plans[-1] = replace(plans[-1], last=total)
    return [replace(plan, total=total) for plan in plans]


def _a_step(duration: Duration, batch: int, steps_per_epoch: int) -> Fraction:
    """How much of a duration one step is, in the duration's unit."""
    if duration.unit == "samples":
        return Fraction(batch)
    return Fraction(1, steps_per_epoch) if duration.unit == "ep" else Fraction(1)
