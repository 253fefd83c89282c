"""Differences of the evidence's arms, paired over what every item gave to a score."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlp.eval import confidence
from vlp.eval.report.records import items_path

Run = dict[str, Any]  # of a finished run: cost, results by label, folder


def distance(runs: list[Run], baseline: list[Run], score: str, unit: int) -> str | None:
    """A score, "label/name", minus the baseline's with its 95 % interval, paired over items; None
    for the baseline, and where not as many of its seeds have finished.
    """
    if runs is baseline or len(runs) != len(baseline):
        return None
    if any(outcomes(run, score) is None for run in (*runs, *baseline)):
        return "no outcomes kept"
    middle, low, high = difference(runs, baseline, score, unit)
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def difference(
    runs: list[Run], baseline: list[Run], score: str, unit: int
) -> tuple[float, float, float]:
    """Of two arms' scores, with its interval; all runs have kept their outcomes."""
    pair = (mean_outcomes(of_arm, score) for of_arm in (runs, baseline))
    middle, low, high = (unit * value for value in confidence.paired_difference(*pair))
    return middle, low, high


def mean_outcomes(runs: list[Run], score: str) -> Tensor:
    """What every item gives to a score, [items, 2], as the mean over the seeds."""
    of_seeds = [of_run for run in runs if (of_run := outcomes(run, score)) is not None]
    return torch.stack(of_seeds).double().mean(0)


def outcomes(run: Run, score: str) -> Tensor | None:
    """What every item gives to a score, [items, 2]; None of runs of before it was kept.

    What was evaluated after training lies in a file of its own, under its task's own label.
    """
    label, name = score.split("/", 1)
    later = items_path(run["folder"] / f"{label}.json")
    if later.exists():
        of_task = {key.split("/", 1)[1]: value for key, value in load_file(later).items()}
        return of_task.get(name)
    of_training = items_path(run["folder"] / "results.json")
    return load_file(of_training).get(score) if of_training.exists() else None


def distance_heading(heading: str) -> str:
    return f"{heading.removesuffix(', %')}: distance"


def unit(heading: str) -> int:
    return 100 if heading.endswith("%") else 1
