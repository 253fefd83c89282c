"""Which checkpoints of a run stay, and which are set aside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlp.files import remove_leftovers
from vlp.pretrained.runs import FOLDER, all_of, looks_complete, named_best

ABANDONED = ".abandoned"  # ending of a checkpoint that the run did not go on from
UNFINISHED = ".tmp"  # ending of a checkpoint that is being written


def prune(run: Path, keep: int, latest: Path | None = None) -> None:
    """Remove all but `latest` (by default the last one), the keep − 1 before it that look complete,
    the best one, and those that stay for good. Called by one rank only.

    Damaged ones go first, so that they take no place of a good one; abandoned ones go when the run
    has passed them.
    """
    checkpoints = all_of(run)
    if not checkpoints:
        return
    latest = latest or checkpoints[-1]

    # By sizes alone: hashes of all would have to read them again after every save.
    others = [path for path in checkpoints if path != latest]
    complete = [path for path in others if looks_complete(path)]
    # Of fewer than that all stay: a negative start would count from the end.
    kept = set(complete[max(0, len(complete) - (keep - 1)) :])
    kept |= {path for path in complete if stays(path)}
    best = named_best(run)
    for path in others:
        if path not in kept and path != best:
            shutil.rmtree(path)

    for path in (run / FOLDER).glob(f"step_*{ABANDONED}"):
        if path.name.split(".")[0] <= latest.name:
            shutil.rmtree(path)


def remove_unfinished(run: Path) -> None:
    """Remove what a killed run left of checkpoints that never stood, of which none may be written
    again. For whoever holds the run's folder.
    """
    for path in (run / FOLDER).glob(f"step_*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    remove_leftovers(run / FOLDER)  # of best.json


def stays(path: Path) -> bool:
    """Whether a checkpoint was saved for good (checkpoint.keep_every)."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return bool(state.get("stays", False))
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def abandon(run: Path, step: int) -> list[Path]:
    """Set aside the checkpoints after `step`, from which the run goes on; returns their new places.

    They belong to a branch that is no longer the run's: `newest` would otherwise go back to it.
    They are removed when the run has saved a later step.
    """
    last_kept = f"step_{step:08d}"
    moved = []
    for path in all_of(run):
        if path.name <= last_kept:
            continue
        place = path.with_name(path.name + ABANDONED)
        shutil.rmtree(place, ignore_errors=True)  # of an even earlier branch
        moved.append(path.rename(place))
    return moved
