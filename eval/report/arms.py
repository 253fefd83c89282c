"""`vlp report --compare`: several arms of an experiment side by side, each of one run or of several
seeds, with the distance of every score from the first arm's.

A distance is paired over what was evaluated (pictures with their captions): each unit counts with
the mean of its outcomes over an arm's seeds, and units are drawn again by the bootstrap. Its
interval says how far other pictures would move it; how far other seeds move a score is the
deviation beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlp.eval import confidence
from vlp.eval.pictures import DataError
from vlp.eval.report import certain, charts, markup, scaling
from vlp.eval.report.comparison import why_not
from vlp.eval.report.markup import Html
from vlp.eval.report.records import Opened, aligned, open_results

RESULTS = "results.json"


@dataclass(frozen=True)
class Arm:
    """One arm: its name, and for every seed the records and outcomes of its evaluation, and the
    folder that they lie in.
    """

    name: str
    seeds: list[list[Opened]]
    folders: list[Path]

    def of(self, label: str, dataset: str | None) -> list[Opened]:
        """The record of one task, and its outcomes, of every seed that has it."""
        return [
            (record, outcomes)
            for opened in self.seeds
            for record, outcomes in opened
            if record["label"] == label and record.get("dataset") == dataset
        ]


@dataclass(frozen=True)
class Distance:
    """How far one score of an arm lies from the first arm's."""

    value: float
    bounds: tuple[float, float] | None  # None: nothing could be paired

    def __str__(self) -> str:
        if self.bounds is None:
            return f"{self.value:+.4f}"
        low, high = self.bounds
        return f"{self.value:+.4f} ({low:+.4f} to {high:+.4f})"

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.bounds is not None and (self.bounds[0] > 0 or self.bounds[1] < 0)


@dataclass(frozen=True)
class Line:
    """What one arm gave in one score."""

    arm: str
    values: list[float]  # of its seeds
    distance: Distance | None  # None: of the first arm, or where the two cannot be compared
    reason: str = ""  # why they cannot

    @property
    def spread(self) -> str:
        """Mean ± standard deviation over seeds."""
        deviation = f" ± {statistics.stdev(self.values):.4f}" if len(self.values) > 1 else ""
        return f"{statistics.mean(self.values):.4f}{deviation}"


@dataclass(frozen=True)
class Score:
    """One score of one task on one set, of all arms that have it."""

    label: str
    dataset: str
    name: str
    lines: list[Line]


# --- reading --------------------------------------------------------------------------------------


def read(places: Sequence[str]) -> list[Arm]:
    """The arms at these places, each NAME=PATH or PATH; the first is what others are held against.

    PATH: a run, a folder of the runs of several seeds, or a file of `vlp eval --out`.
    """
    if len(places) < 2:
        raise ValueError(f"--compare got {len(places)} arm; give the first and what to compare")
    arms = []
    for place in places:
        # The first one: folders are named by their settings, as in lr=0.1.
        name, equals, path = place.partition("=")
        if not equals or Path(place).exists():
            name, path = Path(place).resolve().name, place
        files = _results_at(Path(path))
        seeds = [open_results(str(file)) for file in files]
        arms.append(Arm(name, seeds, [file.parent for file in files]))

    names = [arm.name for arm in arms]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"several arms are called {', '.join(sorted(twice))}; name them NAME=PATH")
    return arms


def _results_at(path: Path) -> list[Path]:
    """The results of the run at `path`, or of each run in that folder."""
    if path.is_file():
        return [path]
    if (path / RESULTS).exists():
        return [path / RESULTS]
    of_seeds = sorted(path.glob(f"*/{RESULTS}"))
    if of_seeds:
        return of_seeds
    raise DataError(
        f"{path} holds neither {RESULTS} nor runs with one; expected a run that has ended with an "
        "`eval` section, a folder of such runs, or a file of `vlp eval MODEL … --out FILE`"
    )


# --- comparing ------------------------------------------------------------------------------------


def compare(arms: list[Arm]) -> list[Score]:
    """Every score of the first arm's tasks, with those of the other arms."""
    scores = []
    tasks = {(r["label"], r.get("dataset")): r for opened in arms[0].seeds for r, _ in opened}
    for (label, dataset), record in tasks.items():
        for name in record["metrics"]:
            first = arms[0].of(label, dataset)
            lines = [
                _line(arm.name, arm.of(label, dataset), first if arm is not arms[0] else None, name)
                for arm in arms
            ]
            shown = [line for line in lines if line is not None]
            scores.append(Score(label, str(dataset or ""), name, shown))
    return scores


def _line(name: str, arm: list[Opened], first: list[Opened] | None, score: str) -> Line | None:
    """The line of an arm, beside the records of the first; None where it has no such score."""
    values = [record["metrics"][score] for record, _ in arm if score in record["metrics"]]
    if not values:
        return None
    if first is None:
        return Line(name, values, None)

    # Every seed has to have read what the first arm read.
    baseline = first[0][0]
    reasons = [reason for record, _ in [*first, *arm] if (reason := why_not(baseline, record))]
    if reasons:
        return Line(name, values, None, reasons[0])

    of_first = [record["metrics"][score] for record, _ in first if score in record["metrics"]]
    pair = _mean_outcomes(arm, score), _mean_outcomes(first, score)
    if pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
        apart = statistics.mean(values) - statistics.mean(of_first)
        return Line(name, values, Distance(apart, None))
    apart, low, high = confidence.paired_difference(pair[0], pair[1])
    return Line(name, values, Distance(apart, (low, high)))


def _mean_outcomes(records: list[Opened], score: str) -> Tensor | None:
    """The outcomes [U, 2] of every unit as the mean over seeds; None where a seed lacks them."""
    of_seeds = [outcomes.get(score) for _, outcomes in records]
    tensors = [outcomes for outcomes in of_seeds if outcomes is not None]
    if len(tensors) < len(of_seeds) or len({outcomes.shape for outcomes in tensors}) != 1:
        return None
    return torch.stack(tensors).double().mean(0)


# --- showing --------------------------------------------------------------------------------------

HEAD = ("arm", "seeds", "mean ± deviation", "distance (95 %)")


def text(scores: list[Score]) -> str:
    """All scores as one table for the console."""
    rows: list[tuple[str, ...]] = [("task", "data", "score", *HEAD)]
    for score in scores:
        for line in score.lines:
            rows.append((score.label, score.dataset, score.name, *_cells(line)))
    return aligned(rows)


def page(arms: list[Arm], scores: list[Score]) -> str:
    """A self-contained HTML document: a section a task, a table a score."""
    lead = (
        f"Distances are from {arms[0].name}, paired over what was evaluated, with 95 % of a "
        "bootstrap over it; bold where that leaves 0 out. Deviations are over seeds."
    )
    sections: list[Html] = []
    for label in dict.fromkeys(score.label for score in scores):
        of_task = [score for score in scores if score.label == label]
        tables = [_table(score) for score in of_task]
        key = f"task-{len(sections)}"
        title = f"{label} · {', '.join(dict.fromkeys(score.dataset for score in of_task))}"
        sections.append(markup.section(key, title, *tables, lead=None if sections else lead))
    final = [(arm.name, [r for opened in arm.seeds for r, _ in opened]) for arm in arms]
    further = [certain.certainty(final, _legend(arms)), scaling.scaling(_scales(arms))]
    sections += [section for section in further if section is not None]
    return markup.page(" against ".join(_named(arms)), sections)


def _scales(arms: list[Arm]) -> list[tuple[scaling.Scale | None, list[dict[str, Any]]]]:
    """Every run of every arm, with how much it is."""
    shown = []
    for arm in arms:
        for opened, folder in zip(arm.seeds, arm.folders):
            shown.append((scaling.scale_of(folder), [record for record, _ in opened]))
    return shown


def _legend(arms: list[Arm]) -> Html:
    """Every arm's name in its colour."""
    names = []
    for place, arm in enumerate(arms):
        key = markup.tag("i", class_=charts.color_class("k", place))
        names.append(markup.tag("span", key, arm.name, class_="legend"))
    return markup.tag("p", names, class_="legends")


def _named(arms: list[Arm]) -> list[str]:
    """Names of the other arms together, and that of the first."""
    return [", ".join(arm.name for arm in arms[1:]), arms[0].name]


def _table(score: Score) -> Html:
    rows: list[list[Any]] = []
    for line in score.lines:
        *cells, apart = _cells(line)
        is_shown = line.distance is not None and line.distance.is_shown
        rows.append([*cells, markup.tag("strong", apart) if is_shown else apart])
    return markup.join([markup.tag("h3", score.name), markup.table(HEAD, rows)])


def _cells(line: Line) -> tuple[str, ...]:
    apart = f"not comparable: {line.reason}" if line.reason else str(line.distance or "")
    return line.arm, str(len(line.values)), line.spread, apart
