"""The result of an evaluation task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a configuration is validated without waiting for torch
    from torch import Tensor


@dataclass
class TaskResult:
    """The scores of one task, with their chance levels, counts and outcomes.

    A score with `items` is Σ numerator / Σ denominator over them, and gets its interval there.
    """

    dataset: str  # the set's name
    # score -> [U, 2] numerator and denominator of each unit
    items: dict[str, Tensor] = field(default_factory=dict)
    # scores that are no such ratio: a median, a distance
    values: dict[str, float] = field(default_factory=dict)
    # of such scores whose 95 % bounds are known
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    # score -> its expectation under random guessing
    chance: dict[str, float] = field(default_factory=dict)
    # how many images, texts, classes, skipped annotations
    counts: dict[str, int] = field(default_factory=dict)
    digest: str = ""  # content hash of pictures and annotations (Context.digest)
