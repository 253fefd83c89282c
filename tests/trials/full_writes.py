"""A disk that runs full at each file that a command writes.

`python -m tests.trials.full_writes PLACE SHARDS CONFIG RUN LIMIT` inside a small tmpfs at PLACE
prints a line of JSON a trial, LIMIT trials a command, spread evenly. Which files a command writes
is found by watching it: Python's own writes by an audit hook, those of safetensors by its function.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from vlp.cli import main


def begin(place: Path, config: Path) -> None:
    """A run of two steps, which the command `train` goes on with."""
    out = f"out={place / 'train'}"
    status, said = quietly(["train", str(config), out, "checkpoint.every=2", "train.duration=2"])
    assert status == 0, said


def commands_of(place: Path, shards: Path, config: Path, run: Path) -> dict[str, list[str]]:
    """One call of each command that writes, all into `place`."""
    out = f"out={place / 'train'}"
    train = f"train {config} {out} checkpoint.every=2 train.duration=4 resume=auto"
    lines = {
        "train": train,
        "export": f"export {run} --to {place / 'export'}",
        "pack": f"data pack {shards.parent / 'pictures'} --to {place / 'pack'}",
        "embed": f"data embed {shards} --model {run} --to {place / 'embed'}",
        "negatives": f"data negatives {shards} --to {place / 'negatives'}",
        "reshard": f"data reshard {shards} --samples-per-shard 7 --to {place / 'reshard'}",
    }
    return {name: line.split() for name, line in lines.items()}


class Watch:
    """Calls `full()` before the write number `at`, counted from 0, and counts all of them."""

    def __init__(self, place: Path) -> None:
        self.n, self.at, self.place = 0, -1, str(place)
        self.full: Callable[[], None] = lambda: None
        self._busy = False
        sys.addaudithook(self._audit)
        save = safetensors.torch.save_file

        def save_file(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
            self._event(str(path))
            save(tensors, path, *arguments, **options)

        safetensors.torch.save_file = save_file

    def _audit(self, event: str, details: tuple) -> None:
        if event == "open" and isinstance(details[0], str) and details[2] is not None:
            writes = details[2] & (os.O_WRONLY | os.O_RDWR)
            if writes:
                self._event(details[0])

    def _event(self, path: str) -> None:
        if self._busy or not os.path.abspath(path).startswith(self.place):
            return
        self.n += 1
        if self.n - 1 == self.at:
            self._busy = True
            self.full()
            self._busy = False


def fill_up(place: Path, n_free: int) -> None:
    """Leave `n_free` bytes, to a page."""
    statistics = os.statvfs(place)
    n_bytes = statistics.f_bavail * statistics.f_frsize - n_free
    with open(place / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, n_bytes)


def trials(place: Path, shards: Path, config: Path, run: Path, limit: int) -> None:
    begin(place, config)
    home = Path(tempfile.mkdtemp()) / "home"
    shutil.copytree(place, home)
    watch = Watch(place)
    for name, command in commands_of(place, shards, config, run).items():
        reset(place, home)
        watch.n, watch.at = 0, -1
        status, said = quietly(command)
        assert status == 0, said
        whole, n_writes = contents(place), watch.n
        stride = max(1, n_writes // limit)
        for at in range(0, n_writes, stride):
            reset(place, home)
            print(json.dumps(trial(name, command, place, watch, at, whole)), flush=True)


def trial(
    name: str, command: list[str], place: Path, watch: Watch, at: int, whole: dict[str, str]
) -> dict[str, Any]:
    before = contents(place)
    # Now nothing of the file fits, now its beginning.
    n_free = (0, 4096, 20_480)[at % 3]
    watch.n, watch.at, watch.full = 0, at, lambda: fill_up(place, n_free)
    status, said = quietly(command)
    (place / "filler").unlink(missing_ok=True)
    watch.at = -1
    after = contents(place)
    # A run's console and configuration grow as it goes; all else that was there stays as it was.
    kept = [p for p in before if not p.endswith(("metrics.jsonl", "config.yaml"))]
    logs = [p for p in after if p.endswith("metrics.jsonl")]
    again, said_again = quietly(command) if status else (0, "")
    return {
        "name": name,
        "at": at,
        "status": status,
        "said": said,
        "missing": [p for p in whole if p not in after],
        "changed": [p for p in kept if after.get(p) != before[p]],
        "torn": [p for p in logs if not whole_lines(place / p)],
        # Finished files in a draft's folder are what the same command goes on with.
        "partial": [
            p for p in after if any(end in Path(p).name for end in (".tmp", "partial", ".lock"))
        ],
        "again": again,
        "said_again": said_again,
        "same_files": contents(place).keys() == whole.keys(),
    }


def reset(place: Path, home: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(home, place, dirs_exist_ok=True)


def contents(place: Path) -> dict[str, str]:
    """Digests of all files."""
    files = [path for path in place.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def whole_lines(path: Path) -> bool:
    """Whether a file holds JSON lines and nothing else."""
    return all(json.loads(line) for line in path.read_text().splitlines()) and path.read_text()[
        -1:
    ] in ("", "\n")


def quietly(command: list[str]) -> tuple[int, str]:
    """Exit status and error output of a command."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(command)
    return status, said.getvalue()


if __name__ == "__main__":
    trials(*map(Path, sys.argv[1:5]), int(sys.argv[5]))
