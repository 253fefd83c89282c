"""Shards in, shards out: one output shard for every input shard, resumable, with counts of what happened and why.

A folder made by `transform` holds `_TOOL.json` (settings and sources; another call must bring the same) and beside every
finished shard `00000_TOOL.json` with its counts, written last: a shard without it is made again.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlp.data.format import ShardWriter, index
from vlp.data.index import ROW
from vlp.data.members import open_sample
from vlp.files import write_atomically

if TYPE_CHECKING:
    from vlp.data.members import Content


class Change(Protocol):
    """What happens to a sample; must be picklable, because shards are changed in several processes."""

    def __call__(self, sample: Content, shard: int, counts: Counter[str]) -> tuple[list[str], dict[str, Any]] | None:
        """The new captions and JSON, or None to drop the sample; either way `counts` learns why."""
        ...


def samples(path: Path, counts: Counter[str]) -> Iterator[Content]:
    """All usable samples of a shard, in order; the others are counted."""
    [shard] = index([path])
    if shard.n_problems:
        counts["unreadable: problems of the input shards"] += shard.n_problems
    with open(path, "rb") as file:
        for offset, length, *_ in ROW.iter_unpack(shard.rows):
            file.seek(offset)
            counts["samples read"] += 1
            yield open_sample(file.read(length))


def claim(folder: Path, tool: str, sources: list[Path], settings: dict[str, Any]) -> None:
    """Make `folder` this tool's output, or take up unfinished work; raises where it holds something else."""
    if folder.resolve() in {path.parent.resolve() for path in sources}:
        raise ValueError(f"{folder} holds the input; name another folder, the input stays as it is")
    # Sources are compared by name and size, so that a data set may move between two calls.
    claimed = {"settings": settings, "sources": [[path.name, path.stat().st_size] for path in sources]}
    claimed = json.loads(json.dumps(claimed))
    note = folder / f"_{tool}.json"
    if note.exists():
        before = json.loads(note.read_text(encoding="utf-8"))
        if before != claimed:
            old, new = ({**c["settings"], "sources": c["sources"]} for c in (before, claimed))
            changed = [f"{k}: {old.get(k)!r} then, {new.get(k)!r} now" for k in {**old, **new} if old.get(k) != new.get(k)]
            raise ValueError(f"{folder} was made from other input or settings ({'; '.join(changed)[:600]}); name another folder")
    elif any(folder.glob("*.tar")):
        raise FileExistsError(f"{folder} already holds shards that `vlp data {tool}` did not make; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(claimed, indent=1).encode())


def transform(sources: list[Path], folder: Path, tool: str, change: Change, processes: int = 1) -> Counter[str]:
    """Write every source shard changed into the claimed `folder`; returns the counts of all shards, old and new."""
    marks = [folder / f"{i:05d}_{tool}.json" for i in range(len(sources))]
    todo = [(i, path) for i, (path, mark) in enumerate(zip(sources, marks)) if not mark.exists()]
    if len(todo) < len(sources):
        print(f"{len(sources) - len(todo)} of {len(sources)} shards are finished already", file=sys.stderr)
    start, n = time.perf_counter(), 0
    for done, counts in enumerate(_map(partial(_one, folder=folder, tool=tool, change=change), todo, processes), 1):
        n += counts["samples read"]
        rate = n / (time.perf_counter() - start)
        print(f"shard {done}/{len(todo)}: {n} samples, {rate:.0f}/s", file=sys.stderr)
    index(sorted(folder.glob("*.tar")))
    return sum((Counter(json.loads(mark.read_text(encoding="utf-8"))) for mark in marks), Counter())


def _one(job: tuple[int, Path], *, folder: Path, tool: str, change: Change) -> Counter[str]:
    number, path = job
    counts: Counter[str] = Counter()
    with ShardWriter(folder, sys.maxsize, first_shard=number, overwrite=True) as writer:
        for sample in samples(path, counts):
            changed = change(sample, number, counts)
            if changed is not None:
                captions, meta = changed
                cls = meta.get("cls")
                writer.add(sample.key, sample.image, sample.image_type, captions, meta, cls if isinstance(cls, int) else None)
                counts["samples written"] += 1
    write_atomically(folder / f"{number:05d}_{tool}.json", json.dumps(counts, indent=1).encode())
    return counts


def _map(function: Any, jobs: list, processes: int) -> Iterator[Any]:
    if min(processes, len(jobs)) <= 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(min(processes, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, jobs)


def report(counts: Counter[str], title: str) -> str:
    """Counts as aligned lines, in the order of their names."""
    width = max(map(len, counts), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {counts[name]:>9,}" for name in sorted(counts))])
