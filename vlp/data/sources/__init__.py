"""Data sources, one a file. `Common` holds the keys that every source takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Common:
    """Keys of every source."""

    weight: float | None = None  # share of the samples drawn; None for all sources: every sample once an epoch

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight is {self.weight}; expected a positive number")
