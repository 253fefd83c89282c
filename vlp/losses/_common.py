"""Keys of every term of an objective."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Schedule:
    """A weight that moves linearly from `start` to `end` over the first `steps` steps.

    After them it stays at `end`.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0 or self.steps < 1:
            raise ValueError(f"a schedule needs start, end >= 0 and steps >= 1, found {self}")

    def at(self, step: int) -> float:
        """The weight of a step."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Common:
    """Keys of every term."""

    weight: float | Schedule = 1.0  # factor of the term in the total, or {start, end, steps}

    def __post_init__(self) -> None:
        if isinstance(self.weight, float) and self.weight < 0:
            raise ValueError(f"weight: found {self.weight}, expected a number >= 0")

    def weight_at(self, step: int | None) -> float:
        """The weight of a step; None: of the first."""
        # Without a step a schedule stands at its start.
        return self.weight.at(step or 0) if isinstance(self.weight, Schedule) else self.weight

    def final(self) -> Common:
        """The same keys with the weight at which a schedule ends."""
        if isinstance(self.weight, Schedule):
            return replace(self, weight=self.weight.end)
        return self
