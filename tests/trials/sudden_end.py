"""A process that kills itself at a named moment of a save: moments too short to be met by chance.

Most are file operations of the save of one step, in the order in which they come: Python's audit
hooks tell of each before it is done. Three lie elsewhere: half of the tensors are copied to the
host, the folder is made and empty, half of the manifest is on the disk.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlp import checkpoint, retention

STEP = 5
UNFINISHED = f"step_{STEP:08d}{retention.UNFINISHED}"
OLD = f"step_{STEP - 2:08d}"  # that goes when STEP's stands, of a run that keeps two
# Name: the audit event, the end of its first argument, and at which removal after it, if at any.
MOMENTS: dict[str, tuple[str, str, int]] = {
    "marks": ("open", f"{UNFINISHED}/manifest.json", 0),
    "appears": ("os.rename", UNFINISHED, 0),
    "prunes": ("shutil.rmtree", OLD, 0),
    "has removed one file": ("shutil.rmtree", OLD, 2),
    "has removed four files": ("shutil.rmtree", OLD, 5),
}
INSIDE = ("has copied half", "has made the folder", "has marked half")


def end_at(moment: str) -> None:
    """Have this process, which is to train, end by SIGKILL at `moment` of the save of STEP."""
    if moment == "has copied half":
        _end_inside_the_copy()
    elif moment == "has made the folder":
        _end_in_the_empty_folder()
    elif moment == "has marked half":
        _end_inside_the_marker()
    else:
        _end_at_event(*MOMENTS[moment])


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _end_at_event(event: str, place: str, removal: int) -> None:
    reached, n_removals = False, 0

    def hook(name: str, details: tuple[Any, ...]) -> None:
        nonlocal reached, n_removals
        # Inside a folder that goes, files are named without it.
        if reached and name == "os.remove":
            n_removals += 1
        if name == event and str(details[0]).endswith(place):
            reached = event != "shutil.rmtree" or _stands_beside(details[0])

        # The kill is an event, too.
        if reached and n_removals >= removal and name != "os.kill":
            _end()

    sys.addaudithook(hook)


def _stands_beside(old: str | Path) -> bool:
    """Whether STEP's checkpoint stands: each save also removes whatever has its own step's name."""
    return Path(old).with_name(f"step_{STEP:08d}").exists()


def _end_inside_the_copy() -> None:
    real, n_saves = torch._foreach_copy_, 0

    def copy(targets: Sequence[Any], sources: Sequence[Any], *arguments: Any) -> None:
        nonlocal n_saves
        n_saves += 1
        if n_saves == STEP:
            half = len(targets) // 2
            real(targets[:half], sources[:half])
            _end()
        real(targets, sources, *arguments)

    torch._foreach_copy_ = copy


def _end_in_the_empty_folder() -> None:
    real = checkpoint.make_empty

    def make_empty(folder: Path) -> None:
        real(folder)
        if folder.name == UNFINISHED:
            _end()

    checkpoint.make_empty = make_empty


def _end_inside_the_marker() -> None:
    real = checkpoint.sync

    def sync(path: Path) -> None:
        if str(path).endswith(MOMENTS["marks"][1]):
            os.truncate(path, path.stat().st_size // 2)
            real(path)
            _end()
        real(path)

    checkpoint.sync = sync
