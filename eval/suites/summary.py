"""What the results of a suite come to: the main score of every set, and their average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp.eval import confidence
from vlp.eval.report.records import aligned
from vlp.eval.suites import Entry
from vlp.eval.suites.places import Located


@dataclass(frozen=True)
class Row:
    """The main score of a set."""

    name: str
    score: str  # its name; of a mean the names with " & "
    value: float | None  # None: the result has no such score
    interval: tuple[float, float] | None  # 95 %
    chance: float | None


@dataclass(frozen=True)
class Summary:
    """The main scores of a suite, their average, and what it is not over."""

    title: str
    source: str
    rows: list[Row]
    absent: list[Entry]

    @property
    def values(self) -> list[float]:
        """The scores that the average is over."""
        return [row.value for row in self.rows if row.value is not None]

    @property
    def average(self) -> float | None:
        """The mean of the main scores, each set of weight one; None without any."""
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def n_sets(self) -> int:
        """How many sets the suite has, absent ones among them."""
        return len(self.rows) + len(self.absent)

    def plain(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "title": self.title,
            "source": self.source,
            "average": self.average,
            "average_over": len(self.values),
            "n_sets": self.n_sets,
            "main_scores": [
                {
                    "set": row.name,
                    "score": row.score,
                    "value": row.value,
                    "interval_95": row.interval and list(row.interval),
                    "chance": row.chance,
                }
                for row in self.rows
            ],
            "absent": [{"set": entry.name, "get": entry.get} for entry in self.absent],
        }


def summarise(
    title: str,
    source: str,
    located: Located,
    records: list[dict[str, Any]],  # of located.tasks
    items: dict[str, Tensor],  # "label/score" -> [U, 2]
) -> Summary:
    """The main scores of the evaluated sets."""
    rows = []
    for entry, task, record in zip(located.entries, located.tasks, records, strict=True):
        scores = entry.scores or [task.module.MAIN]
        rows.append(_row(entry.name, scores, record, items))
    return Summary(title, source, rows, located.absent)


def _row(name: str, scores: list[str], record: dict[str, Any], items: dict[str, Tensor]) -> Row:
    """The mean of the scores of one record."""
    title = " & ".join(scores)
    values = [record["metrics"].get(score) for score in scores]
    if any(value is None for value in values):
        return Row(name, title, None, None, None)

    chances = [record["chance"].get(score) for score in scores]
    chance = None if None in chances else sum(chances) / len(chances)
    return Row(name, title, sum(values) / len(values), _interval(scores, record, items), chance)


def _interval(
    scores: list[str], record: dict[str, Any], items: dict[str, Tensor]
) -> tuple[float, float] | None:
    """95 % bounds of the mean of the scores; None where outcomes by unit do not give them."""
    if len(scores) == 1:
        bounds = record["intervals_95"].get(scores[0])
        return bounds and (bounds[0], bounds[1])

    # Both directions of retrieval are over the same images, and are drawn together.
    outcomes = [items.get(f"{record['label']}/{score}") for score in scores]
    known = [part for part in outcomes if part is not None]
    if len(known) < len(scores) or len({len(part) for part in known}) > 1:
        return None
    drawn = torch.stack([confidence.resampled(part) for part in known])
    return confidence.middle(drawn.mean(0))


# --- for the eye ----------------------------------------------------------------------------------


def table(summary: Summary) -> str:
    """A line a set, then the average and over how many of how many it is."""
    rows: list[tuple[str, ...]] = [("set", "score", "value", "95 %", "chance")]
    rows += [cells(row) for row in summary.rows]
    return "\n".join([aligned(rows), average_line(summary)])


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """A set's line: name, score, value, interval and chance."""
    value = "not scored" if row.value is None else f"{row.value:.4f}"
    interval = "" if row.interval is None else f"{row.interval[0]:.4f} … {row.interval[1]:.4f}"
    chance = "" if row.chance is None else f"{row.chance:.4f}"
    return row.name, row.score, value, interval, chance


def average_line(summary: Summary) -> str:
    """The average, and what it is over."""
    if summary.average is None:
        return f"{summary.title}: no average, as no set has its main score"
    return f"{summary.title}: average {summary.average:.4f} {coverage(summary)}"


def coverage(summary: Summary) -> str:
    """Over how many of its sets a suite's average is."""
    n_scored = len(summary.values)
    if n_scored < summary.n_sets:
        return f"over {n_scored} of {summary.n_sets} sets, NOT COMPARABLE with averages over all"
    return f"over {n_scored} sets"
