"""What a run's folder holds, read as far as it goes: runs that are still going, crashed or lost
files are no errors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from vlp import checkpoint
from vlp.config import Duration
from vlp.eval.report.records import records_in

NOT_SCALARS = {"step", "kind"}
MARKS = ("config.yaml", "metrics.jsonl", "results.json", checkpoint.FOLDER)  # one of them: a run


@dataclass
class Run:
    """A run as found on disk. `notes` say what is missing and why."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    train: list[dict[str, Any]] = field(default_factory=list)  # records of training steps
    evals: list[dict[str, Any]] = field(default_factory=list)  # records of evaluations
    # of the last step (vlp.eval.report.records)
    results: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)  # state.json of the newest checkpoint
    written: datetime | None = None  # when metrics.jsonl last grew
    notes: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        steps = [record["step"] for record in (*self.train[-1:], *self.evals[-1:])]
        return max([*steps, self.state.get("step", 0)])

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, where the configuration and the newest checkpoint tell."""
        train = self.config.get("train", {})
        try:
            duration, batch = Duration.from_config(train["duration"]), int(train["batch"])
            steps_per_epoch = 1
            if duration.unit == "ep":
                steps_per_epoch = self.state["loader"]["samples"] // batch
            return duration.steps(batch=batch, steps_per_epoch=steps_per_epoch)
        except (KeyError, TypeError, ValueError):
            return None  # shown as unknown

    @property
    def finished(self) -> bool:
        """Whether the last planned step has been made."""
        if self.results:
            return True
        return self.planned_steps is not None and self.last_step >= self.planned_steps

    def scalar(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a training scalar."""
        return _points(self.train, key)

    def score(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of a score, "label.metric"."""
        return _points(self.evals, key)

    def last_scores(self) -> dict[str, float]:
        """The newest value of every score that was logged."""
        scores: dict[str, float] = {}
        for record in self.evals:
            scores |= {key: value for key, value in record.items() if key not in NOT_SCALARS}
        return scores


def _points(records: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of the records that log the key."""
    return [
        (record["step"], float(record[key]))
        for record in records
        if isinstance(record.get(key), (int, float))
    ]


def read(folder: Path) -> Run:
    """The run in `folder`; a ValueError if there is none."""
    if not any((folder / mark).exists() for mark in MARKS):
        reason = "is no folder; a run's holds"
        if folder.is_dir():
            reason = "is no run: it holds none of"
        raise ValueError(
            f"{folder} {reason} {', '.join(MARKS)}. "
            "Give the folder that `vlp train` wrote (its out=…)"
        )

    run = Run(folder, folder.resolve().name)

    # The state and the copies of the configuration lie in the checkpoints.
    run.checkpoints = [path.name for path in checkpoint.all_of(folder)]
    run.state = _state(run)
    run.config = _config(run)
    _read_metrics(run)
    run.results = _results(run)
    _note_the_whole(run)
    return run


def tell_apart(first: Run, second: Run) -> None:
    """Give two runs different names; a ValueError if they are the same."""
    if first.folder.resolve() == second.folder.resolve():
        raise ValueError(
            f"{first.folder} and {second.folder} are the same run; name another to compare with"
        )
    if first.name == second.name:
        for run in (first, second):
            run.name = f"{run.folder.resolve().parent.name}/{run.name}"


# --- its files ------------------------------------------------------------------------------------


def _state(run: Run) -> dict[str, Any]:
    """state.json of the newest checkpoint that has a readable one."""
    for name in reversed(run.checkpoints):
        path = run.folder / checkpoint.FOLDER / name / "state.json"
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            state = None
        if isinstance(state, dict):
            return state
        run.notes.append(f"checkpoint {name} has no readable state.json")
    return {}


def _config(run: Run) -> dict[str, Any]:
    """The run's configuration, or the copy of the newest checkpoint that has a readable one."""
    of_checkpoints = [f"{checkpoint.FOLDER}/{name}/config.yaml" for name in run.checkpoints]
    for place in ("config.yaml", *reversed(of_checkpoints)):
        try:
            tree = yaml.safe_load((run.folder / place).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
            run.notes.append(
                f"{place} cannot be read ({type(error).__name__}); "
                "the configuration may be incomplete"
            )
            continue

        if not isinstance(tree, dict):
            run.notes.append(f"{place} holds {type(tree).__name__}, expected a mapping")
            continue
        if place != "config.yaml":
            run.notes.append(f"no readable config.yaml: the configuration is that of {place}")
        return tree

    run.notes.append(
        "no configuration: neither the run nor a checkpoint has a readable config.yaml"
    )
    return {}


def _read_metrics(run: Run) -> None:
    """Fill in what metrics.jsonl holds, line by line: a damaged line costs only itself."""
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        run.notes.append(
            "no curves: metrics.jsonl is not there (the run has logged nothing yet, or the file "
            "was removed)"
        )
        return

    run.written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    # The run may be writing at this moment: its last line may be cut off.
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records = {"train": run.train, "eval": run.evals}[record["kind"]]
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            run.notes.append(_damaged_line(number, len(lines)))
            continue
        records.append(record)

    if not run.train:
        run.notes.append("no curves: metrics.jsonl holds no training record yet")


def _damaged_line(number: int, n_lines: int) -> str:
    """The note on a line of metrics.jsonl that is no record."""
    if number < n_lines:
        return f"line {number} of metrics.jsonl was left out: it is damaged"
    return (
        "the last line of metrics.jsonl was left out: it is cut off, as while a run writes or "
        "after it was killed"
    )


def _results(run: Run) -> list[dict[str, Any]]:
    """The final records, if they were written."""
    try:
        content = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        records = records_in(content)
        return [
            record for record in records if isinstance(record["metrics"], dict) and record["label"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        run.notes.append(
            f"results.json cannot be read ({type(error).__name__}); "
            "final scores are those of metrics.jsonl"
        )
        return []


# --- the whole picture ----------------------------------------------------------------------------


def _note_the_whole(run: Run) -> None:
    """Notes that need all files: divergence, missing checkpoints, where the run stands, scores."""
    # null stands for NaN and infinity; a record without a loss has not diverged.
    lost = [record["step"] for record in run.train if not _is_finite(record.get("loss", 0.0))]
    if lost:
        more = f" and {len(lost) - 1} more" if lost[1:] else ""
        run.notes.append(f"the loss is not finite at step {lost[0]}{more}")

    if not run.checkpoints:
        run.notes.append(
            "no checkpoint: nothing that needs the model can be shown (embeddings, confusion, "
            "sheets, examples)"
        )

    # Nothing tells a run that is still going from one that crashed, but when it last wrote.
    if not run.finished:
        total = run.planned_steps
        of_total = f" of {total:,}" if total else ""
        written = f", last written {run.written:%Y-%m-%d %H:%M} UTC" if run.written else ""
        run.notes.append(
            f"unfinished: step {run.last_step:,}{of_total}{written}; "
            "the run is still going, was stopped or crashed"
        )

    if run.config and not run.config.get("eval"):
        run.notes.append("no scores: the configuration has no eval section")
    elif run.train and not run.evals and not run.results:
        run.notes.append(
            "no scores yet: no evaluation of the eval section was due before the run's last step"
        )


def _is_finite(value: float | None) -> bool:
    # metrics.jsonl holds null for NaN and infinity.
    return value is not None and math.isfinite(value)
