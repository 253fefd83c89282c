"""Commands on a file system that is full: `python -m tests.full_disk PLACE SHARDS CONFIG RUN`
inside a small tmpfs at PLACE.

Prints JSON, a trial a command: the exit status, what it said, what it left behind, and whether what
was there before still is; last, whether the same command does its work once there is room.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
from pathlib import Path

from vlp.cli import main

FREE = {
    "train": 300_000,
    "export": 30_000,
    "pack": 6_000,
    "embed": 3_000,
    "negatives": 6_000,
    "reshard": 6_000,
}


def trials(place: Path, shards: Path, config: Path, run: Path) -> list[dict]:
    """Each command first on a full disk, then on one with room."""
    out = f"out={place / 'train'}"
    status, said = quietly(["train", str(config), out, "checkpoint.every=2", "train.duration=2"])
    assert status == 0, said
    commands = {
        "train": [
            "train",
            str(config),
            out,
            "checkpoint.every=2",
            "train.duration=4",
            "resume=auto",
        ],
        "export": ["export", str(run), "--to", str(place / "export")],
        "pack": ["data", "pack", str(shards.parent / "pictures"), "--to", str(place / "pack")],
        "embed": ["data", "embed", str(shards), "--model", str(run), "--to", str(place / "embed")],
        "negatives": ["data", "negatives", str(shards), "--to", str(place / "negatives")],
        "reshard": [
            "data",
            "reshard",
            str(shards),
            "--samples-per-shard",
            "7",
            "--to",
            str(place / "reshard"),
        ],
    }
    return [trial(name, command, place) for name, command in commands.items()]


def trial(name: str, command: list[str], place: Path) -> dict:
    """One command on a disk that is filled but for some bytes."""
    before = contents(place)
    filler = place / "filler"
    fill(filler, FREE[name])
    status, said = quietly(command)
    filler.unlink()
    after = contents(place)
    kept = {
        path: after.get(path)
        for path in before
        if not path.endswith(("metrics.jsonl", "config.yaml"))
    }
    torn = [
        path for path in after if path.endswith("metrics.jsonl") and not whole_lines(place / path)
    ]
    return {
        "name": name,
        "status": status,
        "said": said,
        "torn": torn,
        "changed": [path for path in kept if kept[path] != before[path]],
        "partial": [
            path for path in after if ".tmp" in path or "partial" in path or ".lock" in path
        ],
        "again": quietly(command)[0],
    }


def fill(path: Path, n_free: int) -> None:
    """Write a file that leaves `n_free` bytes, to a page."""
    statistics = os.statvfs(path.parent)
    path.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize - n_free))


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
    print(json.dumps(trials(*map(Path, sys.argv[1:]))))
