"""Long trials: processes killed at any moment and resumed elsewhere; memory over an hour's worth of
batches.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data.material import data_of, loader_of, write_shards
from vlp.types import Batch

BATCH, STEPS = 12, 40
AUGMENT = {"scale": [0.4, 1.0], "flip": 0.5}


def digest(batches: list[Batch]) -> str:
    """Of the rows of a step, rank after rank."""
    rows = [
        (key, image.numpy().tobytes(), text.tolist())
        for b in batches
        for key, image, text in zip(b.key, b.image, b.text)
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def train_until_killed(
    sources: list[dict[str, Any]],
    workers: int,
    world: int,
    state: dict[str, Any] | None,
    out: str,
    cache: str,
) -> None:
    """All ranks of a run in one process: a line a step with its digest and the state after it."""
    os.environ["VLP_CACHE"] = cache  # the fork server may be older than this test
    ranks = [
        loader_of(data_of(*sources, augment=AUGMENT, workers=workers), BATCH, rank=r, world=world)
        for r in range(world)
    ]
    for rank in ranks if state else []:
        rank.load_state_dict(state)
    with open(out, "a") as file:
        while (step := ranks[0].state_dict()["step"]) < STEPS:
            found = digest([next(rank) for rank in ranks])
            file.write(json.dumps([step, found, ranks[0].state_dict()]) + "\n")
            file.flush()


def whole_lines(out: Path) -> list[list[Any]]:
    text = out.read_text() if out.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def kinds_of_data(folder: Path) -> list[list[dict[str, Any]]]:
    many = {"name": "shards", "path": str(write_shards(folder / "many", 103, 10))}
    one = {"name": "shards", "path": str(write_shards(folder / "one", 50, 100, start=200))}
    stream = {
        "name": "webdataset",
        "urls": f"{folder}/many/{{00000..00009}}.tar",
        "samples": 100,
        "parts": 2,
        "run": 6,
    }
    remote = {"name": "remote", "path": f"file://{folder}/many/", "window": 2}
    weighted = [
        {**source, "weight": weight} for source, weight in zip((many, one, stream), (0.5, 0.3, 0.2))
    ]
    return [
        [many, one],
        [one],
        weighted,
        [stream],
        [remote],
        [{**remote, "weight": 2}, {**one, "weight": 1}],
    ]


@pytest.mark.parametrize(
    "trials", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_run_killed_at_any_moment_continues_exactly(tmp_path, monkeypatch, trials):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vlp.data.loader", "open_clip"])
    data = kinds_of_data(tmp_path)
    reference = []
    for sources in data:
        loader = loader_of(data_of(*sources, augment=AUGMENT), BATCH)
        reference.append([digest([next(loader)]) for _ in range(STEPS)])
    assert len({steps[0] for steps in reference}) == len(data)
    chance, n_killed, n_compared = random.Random(trials), 0, 0
    for trial in range(trials):
        kind, out, state = 2 * trial % len(data) + trial // 3 % 2, tmp_path / f"{trial}.jsonl", None
        for life in range(2):
            workers = 1 if trial % 60 == 59 and life == 0 else 0
            world = chance.choice([1, 2, 3, 4])
            child = context.Process(
                target=train_until_killed,
                args=(data[kind], workers, world, state, str(out), str(tmp_path / "cache")),
            )
            child.start()
            wanted = len(whole_lines(out)) + chance.randrange(1, 12)
            while child.is_alive() and len(whole_lines(out)) < wanted:
                time.sleep(0.002)
            time.sleep(chance.random() * 0.02)
            child.kill()
            child.join()
            n_killed += child.exitcode == -9
            with open(out, "a") as file:  # what was being written when the end came is no line
                file.truncate(sum(len(json.dumps(line)) + 1 for line in whole_lines(out)))
            state = whole_lines(out)[-1][2]
        lines = whole_lines(out)
        assert [line[0] for line in lines] == list(range(len(lines))), trial
        assert [line[1] for line in lines] == reference[kind][: len(lines)], (trial, kind)
        n_compared += len(lines)
    assert n_killed == 2 * trials and n_compared > 6 * trials


def tree_bytes() -> int:
    """Resident memory of this process and all it started, without the pages of files, which others
    may share or not.
    """
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    status = "".join(Path(f"/proc/{process.pid}/status").read_text() for process in tree)
    return (
        sum(int(kilobytes) for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))
        * 1024
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_an_hours_worth_of_batches(tmp_path, monkeypatch):
    """7,200 batches, two a second for an hour, through two loader processes and every kind of
    source.
    """
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    sources = kinds_of_data(tmp_path)
    weighted = [*sources[2], {**sources[4][0], "weight": 0.2}]
    loader = loader_of(data_of(*weighted, augment=AUGMENT, workers=2), BATCH)
    seen = []
    for batch in range(7_201):
        next(loader)
        if batch % 1_200 == 0 and batch:
            seen.append(tree_bytes())
    assert len(seen) == 6 and loader.counters()["bad_samples"] == 0
    assert max(seen[1:]) - seen[0] < 20e6, seen  # the caches of words and shards are full by then
