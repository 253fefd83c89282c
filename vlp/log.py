"""Console lines, metrics.jsonl and trackers. No arithmetic happens here; numbers arrive finished,
and secrets stay here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp.console import above_bar
from vlp.files import naming, write_all, write_atomically
from vlp.privacy import scrubbed


def say(message: str) -> None:
    """A line for the person at the console, from one process only."""
    if os.environ.get("RANK", "0") == "0":
        with above_bar():
            print(scrubbed(message), flush=True)


def warn(message: str) -> None:
    """A line that must not be missed; on the error stream of every process that has something to
    warn of.
    """
    # The launcher's variable, because warnings also come before processes join.
    rank = os.environ.get("RANK")
    place = f" (rank {rank})" if rank else ""
    with contextlib.suppress(BrokenPipeError), above_bar():
        print(f"warning{place}: {scrubbed(message)}", file=sys.stderr, flush=True)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, those of damaged lines left out; none without the file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if _step(line) < math.inf:
            yield json.loads(line)


class Metrics:
    """metrics.jsonl of a run: one JSON object a line with `step` and `kind` ("train" or "eval").

    On a resume the lines after the resumed step are dropped, so that the file reads like an
    uninterrupted run.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        kept = []
        if path.exists():
            # A line with damaged bytes is none, and goes; the run goes on.
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [f"{line}\n" for line in lines if _step(line) <= resumed_step]
        write_atomically(path, "".join(kept).encode())

        # Unbuffered, so that a kill loses no line that was written.
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system at once, whole or not at all;
        raises OSError.

        NaN and infinity, which JSON has no words for, become null.
        """
        values = {
            name: None if isinstance(v, float) and not math.isfinite(v) else v
            for name, v in values.items()
        }
        line = json.dumps({"step": step, "kind": kind, **values}) + "\n"

        # Half a line, as a full disk leaves it, would spoil the file for every reader.
        size = os.fstat(self._file.fileno()).st_size
        try:
            with naming(self._path):
                write_all(self._file, line.encode())
        except OSError:
            self._file.truncate(size)
            raise

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    """The step that a line of metrics.jsonl is about; infinity for a line that is no record."""
    try:
        step = json.loads(line)["step"]
    # Cut off by a kill, or damaged: any value of JSON may stand there.
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, (int, float)) else math.inf


class Trackers:
    """TensorBoard, wandb or trackio by name, through Accelerate; a name whose package is missing is
    an error.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any]) -> None:
        self._trackers = [_tracker(name, run) for name in names]
        for tracker in self._trackers:
            tracker.store_init_configuration({"config": json.dumps(config)})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed."""
    if not names:  # the import takes a second
        return
    from accelerate.tracking import get_available_trackers

    # Members of an enumeration, or plain text, as Accelerate's version has it.
    available = [str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"log.trackers names {name!r}, whose package is not installed: "
                f"pip install {name}, or leave it out"
            )


def _tracker(name: str, run: Path) -> Any:
    """Accelerate's tracker of this name, started."""
    import torch
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    # Accelerate's trackers ask it which process they are in.
    PartialState(cpu=not torch.cuda.is_available())

    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":  # Accelerate appends the name to the folder: RUN/tensorboard
        tracker = kind(name, logging_dir=run)
    else:
        place = {"dir": run} if name == "wandb" else {}
        tracker = kind(run.absolute().name, **place)

    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def progress(step: int, total: int, values: Mapping[str, float], eta_s: float) -> str:
    """One console line: step, every value with four significant digits, and the time left."""
    width = len(str(total))
    return f"step {step:>{width}}/{total}  {columns(values, eta_s)}"


def columns(values: Mapping[str, float], eta_s: float) -> str:
    """What stands behind the steps in a line or a bar: every value, and the time left."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    return f"{shown}  eta {clock(eta_s)}".lstrip()


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
