"""`vlp eval --blend A B`: the models on the line between two, gain against guard (WiSE-FT, Wortsman
et al., arXiv 2109.01903).

Fine-tuning B from A raises what it was tuned on and lowers what A could besides. Between them often
lies a model with most of the gain and little of the loss; the table shows where:

    alpha   gain and its change from A   guard and its change from A

Over a suite of sets the gain is its average, unless another score is asked for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.eval.suites.command import Asked
    from vlp.eval.suites.summary import Summary
    from vlp.models.dual_encoder import DualEncoder
    from vlp.plugin import Plugin

ALPHAS = "0,0.25,0.5,0.75,1"
AVERAGE = "average"  # the score that is the mean of a suite's main scores
# (a blend, its name) -> the tasks' records, and the outcomes by unit
Evaluated = Callable[["DualEncoder", str], tuple[list[dict[str, Any]], dict[str, "Tensor"]]]


@dataclass(frozen=True)
class Sweep:
    """Which blends are evaluated, and the two scores of the table; None: what the tasks come to."""

    references: list[str]  # A and B
    alphas: list[float]
    gain: str | None
    guard: str | None


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    blend_help = "in place of MODEL: (1 - alpha) A + alpha B of weights, for each of --alphas"
    add("--blend", nargs=2, metavar=("A", "B"), help=blend_help)
    add("--alphas", metavar="N,N", help=f"of --blend (default {ALPHAS})")
    gain_help = (
        "of --blend: what is to rise (default: the first task's first score; of --suite NAME its "
        f"average, which is called {AVERAGE})"
    )
    add("--gain", metavar="TASK.SCORE", help=gain_help)
    guard_help = (
        "of --blend: what is not to fall (default: the second task's first score; of --suite NAME "
        "nothing)"
    )
    add("--guard", metavar="TASK.SCORE", help=guard_help)


def asked_for(
    options: argparse.Namespace, tasks: Sequence[Plugin], has_average: bool = False
) -> Sweep | None:
    """The sweep that the options of `vlp eval` ask for over tasks, or over those of a suite, which
    has an average; or None. ValueError for options that do not go together.
    """
    belonging = {"--alphas": options.alphas, "--gain": options.gain, "--guard": options.guard}
    if not options.blend:
        stray = [name for name, value in belonging.items() if value is not None]
        if stray:
            raise ValueError(f"{stray[0]} belongs to --blend A B; leave it out, or give two models")
        return None
    if options.out and options.out.endswith("/"):
        raise ValueError(
            f"--out {options.out} is a folder, and a sweep is one file; name it, such as sweep.json"
        )
    if options.model:
        raise ValueError(f"found MODEL {options.model!r} and --blend; expected one of the two")
    if options.ema:
        raise ValueError("--ema with --blend does not say whose; write RUN@ema for A or B")

    from vlp.averaging import fractions
    from vlp.pretrained.references import resolve

    gain = AVERAGE if options.gain is None and has_average else options.gain
    for score in (gain, options.guard):
        if score is not None and (score != AVERAGE or not has_average):
            _check_score(score, tasks)
    for reference in options.blend:
        resolve(reference)
    alphas = fractions("--alphas", ALPHAS if options.alphas is None else options.alphas)
    return Sweep(options.blend, sorted(set(alphas)), gain, options.guard)


def _check_score(score: str, tasks: Sequence[Plugin]) -> None:
    """Raise ValueError for a score that no task evaluated here gives."""
    from vlp import watch

    # A label may hold dots, such as that of a set in a suite of one's own.
    of_task = {task.label: task for task in tasks if score.startswith(f"{task.label}.")}
    if not of_task:
        raise ValueError(
            f"{score!r} is no score of a task evaluated here; expected TASK.SCORE with TASK one of "
            f"{', '.join(task.label for task in tasks)}"
        )

    offered = []
    for label, task in of_task.items():
        others = watch.unlisted(task, score.removeprefix(f"{label}."))
        if not others:
            return
        offered += [f"{label}.{name}" for name in others]
    raise ValueError(f"no score {score!r}; the tasks give {', '.join(offered)}")


def carry_out(
    sweep: Sweep, evaluate: Evaluated, out: str | None, suite: Asked | None = None
) -> None:
    """Evaluate every blend, print the table, and write all of it to the file `out`. Collective.

    suite: whose sets are evaluated; every row then has what their main scores come to.
    """
    from vlp import averaging, dist
    from vlp.eval.suites import command
    from vlp.eval.suites.summary import coverage
    from vlp.files import write_atomically

    # Both once; a blend is made of them in memory.
    models = list(averaging.loaded(sweep.references))
    gain, guard = sweep.gain, sweep.guard
    rows: list[dict[str, Any]] = []
    summary: Summary | None = None
    for alpha in sweep.alphas:
        members = averaging.blend(sweep.references, alpha)
        blended = averaging.mean_of(models, members.weights, members.references)
        name = f"{1 - alpha:g} · {sweep.references[0]} + {alpha:g} · {sweep.references[1]}"
        records, items = evaluate(blended, name)
        summary = None if suite is None else command.summary_of(suite, records, items)

        # Known from the first on, so that a wrong name costs one evaluation and not all.
        if summary is None:
            gain, guard = _scores_of(records, gain, guard)
        row: dict[str, Any] = {
            "alpha": alpha,
            "gain": _value(records, str(gain), summary),
            "guard": None if guard is None else _value(records, guard, summary),
        }
        if summary is not None:
            row["suite"] = summary.plain()
        rows.append({**row, "records": records})

    if not dist.is_main():
        return
    lines = [table(rows, str(gain), guard)]
    if summary is not None:
        lines.append(f"{summary.title}: {AVERAGE} {coverage(summary)}")
    # Every blend meets the same data, and lacks the same.
    print("\n".join([*lines, *command.notes(suite, rows[0]["records"])]))
    if out is not None:
        a, b = sweep.references
        result = {"a": a, "b": b, "gain": gain, "guard": guard, "rows": rows}
        text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(Path(out), f"{text}\n".encode())
        print(f"written: {out}")


def _scores_of(
    records: list[dict[str, Any]], gain: str | None, guard: str | None
) -> tuple[str, str | None]:
    """The two scores of the table: those asked for, else the first of the first task and of the
    second, if there is one.
    """
    firsts = [f"{record['label']}.{next(iter(record['metrics']))}" for record in records]
    if gain is None:
        gain = firsts[0]
    if guard is None and len(firsts) > 1:
        guard = firsts[1]
    return gain, guard


def _value(records: list[dict[str, Any]], score: str, summary: Summary | None = None) -> float:
    """A score "label.metric" of the records, or the average; ValueError lists those that there
    are.
    """
    values: dict[str, float] = {}
    if summary is not None and summary.average is not None:
        values[AVERAGE] = summary.average
    for record in records:
        for metric, value in record["metrics"].items():
            values[f"{record['label']}.{metric}"] = value
    if score not in values:
        raise ValueError(f"no score {score!r}; the tasks give {', '.join(values)}")
    return values[score]


def table(rows: list[dict[str, Any]], gain: str, guard: str | None) -> str:
    """The rows for the eye, with each score's change from the first row."""
    from vlp.eval.report.records import aligned

    shown = {"gain": gain} if guard is None else {"gain": gain, "guard": guard}
    header = ["alpha"]
    for role, score in shown.items():
        header += [f"{role}: {score}", "change"]

    lines = [tuple(header)]
    for row in rows:
        cells = [f"{row['alpha']:g}"]
        for role in shown:
            change = row[role] - rows[0][role]
            cells += [f"{row[role]:.4f}", f"{change:+.4f}"]
        lines.append(tuple(cells))
    return aligned(lines)
