"""Effective robustness: how far a model lies above the line that reference models draw between a
standard set and a shifted one (Taori et al. 2020, "Measuring robustness to natural distribution
shifts").

    line       logit(shifted) = a + b · logit(standard), least squares over the reference models
    ρ          shifted − σ(a + b · logit(standard))

References are a table of accuracies, or results of `vlp eval`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.eval import choices
from vlp.eval.datasets.tables import read_rows
from vlp.eval.pictures import DataError

COLUMNS = ("standard", "shifted")
SCORES = ("acc1_standard", "acc1_shifted")  # of the task `robustness`


@dataclass(frozen=True)
class Line:
    """What accuracy on the shifted set the references lead to expect."""

    intercept: float
    slope: float
    residual: float  # standard deviation of the references' shifted accuracies around the line
    lowest: float  # standard accuracy of the references; beyond these two the line is a guess
    highest: float
    n: int  # reference models

    def expected(self, standard: Tensor) -> Tensor:
        """The shifted accuracies expected at standard ones [...] in (0, 1)."""
        return (self.intercept + self.slope * standard.double().logit()).sigmoid()


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (standard, shifted) accuracies; ValueError for too few or useless ones."""
    accuracies = torch.tensor(points, dtype=torch.float64).view(-1, 2)
    inside = bool(((accuracies > 0) & (accuracies < 1)).all())
    n_different = len(accuracies[:, 0].unique())
    if n_different < 2 or not inside:
        raise ValueError(
            f"found {len(points)} reference models with {n_different} different standard "
            "accuracies; effective robustness needs two or more, all within (0, 1)"
        )

    standard, shifted = accuracies.unbind(1)
    logits = accuracies.logit()
    design = torch.stack([torch.ones_like(standard), logits[:, 0]], 1)
    intercept, slope = torch.linalg.lstsq(design, logits[:, 1:]).solution[:, 0].tolist()
    off = shifted - (design @ torch.tensor([intercept, slope]).double()).sigmoid()
    residual = math.sqrt(float(off.square().mean()))
    return Line(
        intercept, slope, residual, float(standard.min()), float(standard.max()), len(points)
    )


# --- references -----------------------------------------------------------------------------------


def read(
    places: str | list[str],  # tables, results of `vlp eval`, or folders of such results
    names: tuple[str, str],  # of the standard and the shifted set, as results call them
) -> Line:
    """The line of the reference models in these files; a DataError says what is wrong with one."""
    points: list[tuple[float, float]] = []
    files = list(_files([places] if isinstance(places, str) else places))
    for file in files:
        points += _points(file, names)
    try:
        return fit(points)
    except ValueError as error:
        raise DataError(f"reference {', '.join(map(str, files))}: {error}") from None


def _files(places: Iterable[str]) -> Iterable[Path]:
    for place in places:
        path = Path(place).expanduser()
        if not path.exists():
            raise DataError(
                f"no reference at {path}; expected a table with the columns "
                f"{' and '.join(COLUMNS)}, or results of vlp eval"
            )
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise DataError(
                f"the reference {path} is a folder without a .json; fill it with `vlp eval MODEL "
                f"--task robustness … --out {path}/MODEL.json`"
            )
        yield from files


def _points(file: Path, names: tuple[str, str]) -> list[tuple[float, float]]:
    """The (standard, shifted) accuracies of a file."""
    content = choices.read_json(file) if file.suffix == ".json" else None
    if isinstance(content, dict):
        content = content.get("results", [content])
    results = [row for row in content if _is_result(row)] if isinstance(content, list) else []
    if results:
        return [_of_results(results, names, file)]

    rows = read_rows(file)
    choices.need_keys(rows, COLUMNS, file)
    return [(_share(row["standard"], file), _share(row["shifted"], file)) for row in rows]


def _is_result(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("metrics"), dict)


def _of_results(
    records: list[dict[str, Any]], names: tuple[str, str], file: Path
) -> tuple[float, float]:
    """One model's pair: of the task `robustness`, else of `zeroshot` on sets of these names."""
    scores: dict[str, Any] = {}
    for record in records:
        metrics, name = record["metrics"], record.get("dataset")
        if set(SCORES) <= metrics.keys() and name == " → ".join(names):
            return _share(metrics[SCORES[0]], file), _share(metrics[SCORES[1]], file)
        if name in names and "acc1" in metrics:
            scores.setdefault(name, metrics["acc1"])

    missing = [name for name in names if name not in scores]
    if missing:
        sets = [str(record.get("dataset")) for record in records]
        raise DataError(
            f"{file} has no acc1 on {' and '.join(missing)}, only results on "
            f"{', '.join(sets) or 'nothing'}; make it with the tasks robustness or zeroshot on the "
            "same two sets"
        )
    return _share(scores[names[0]], file), _share(scores[names[1]], file)


def _share(value: Any, file: Path) -> float:
    """An accuracy as a share of one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise DataError(
            f"{file}: an accuracy is {value!r}, expected a share between 0 and 1 (not in percent)"
        )
    return float(value)
