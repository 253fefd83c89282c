"""Evaluation tasks, one a file. `Common` holds the keys that every task of a training configuration takes."""

from __future__ import annotations

from dataclasses import dataclass

from vlp.config import Duration


@dataclass(frozen=True)
class Common:
    """Keys of every task."""

    every: Duration | None = None  # how often during training; None: only at the end
