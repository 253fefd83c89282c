"""Shards in, shards out: one output shard for every input shard, resumable, with counts of what
happened and why.

A folder made by `transform` holds `_TOOL.json` (settings and sources; another call must bring the
same) and beside every finished shard its mark `00000_TOOL.json` with its counts (see `work`).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from vlp.data.captions import Choice
from vlp.data.format import ShardWriter, index_written, is_class_number
from vlp.data.scan import scan
from vlp.data.tables import fetched
from vlp.data_tools._belonging import settle
from vlp.data_tools._run.carried import Carried
from vlp.data_tools._run.work import Job, Pool, Result, carry_out, read_note
from vlp.files import write_atomically
from vlp.privacy import without_secrets

if TYPE_CHECKING:
    from vlp.data.members import Content

Thing = TypeVar("Thing")


class Changed(NamedTuple):
    """A sample that goes into the output, with the captions and the JSON that it has there."""

    sample: Content
    captions: list[str]
    meta: dict[str, Any]


class Change(Protocol):
    """What happens to the samples of a shard; must be picklable, because shards are changed in
    several processes.
    """

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        """The samples that stay, in order; `counts` learns why the others do not. `shard` is the
        input's number.
        """
        ...


def samples(path: Path, counts: Counter[str], *, rewritten: bool = False) -> Iterator[Content]:
    """All usable samples of a shard, in order; the others are counted. `rewritten`: into a new
    shard, which takes over sounds, frames and numbers; what nobody reads is counted.
    """
    # Scanned anew: an index may be out of date, and what a tool writes is there to stay.
    shard = scan(path)
    rows = rows_beside(path, counts)
    if shard.n_problems:
        counts["unreadable: problems of the input shards"] += shard.n_problems
    carried = Carried(path, shard) if rewritten else None
    if carried is not None:
        counts.update(carried.counts())

    with open(path, "rb") as file:
        for i in range(shard.count):
            counts["samples read"] += 1
            sample = shard.sample(file, i)
            if row := rows.get(sample.key):
                complete(sample, row, counts)
            settle(sample, counts)
            if carried is not None:
                sample.further = partial(carried.of, sample.key)
            yield sample


def rows_beside(
    path: Path, counts: Counter[str], keys: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """What img2dataset noted of a shard's samples, by key; `keys`: of these alone."""
    try:
        return fetched.rows_beside(path, keys)
    # The samples are whole without it.
    except (ValueError, OSError):
        counts["unreadable: parquet files beside shards"] += 1
        return {}


def complete(sample: Content, row: dict[str, Any], counts: Counter[str]) -> None:
    """Give a sample the columns that its JSON lacks, and the caption where it has none."""
    counts["completed from the parquet file beside the shard"] += 1
    sample.meta = fetched.completed(sample.meta, row)
    if not sample.captions and not sample.text:
        sample.captions = Choice().captions(sample.meta, sample.text)


def windows(things: Iterable[Thing], size: int) -> Iterator[list[Thing]]:
    """The things, samples say, in runs of `size`, the last one shorter."""
    things = iter(things)
    window = list(islice(things, size))
    while window:
        yield window
        window = list(islice(things, size))


def put(writer: ShardWriter, changed: Changed, key: str | None) -> None:
    """Write a sample under a key (None: the next number) with everything that our format holds of
    it.
    """
    sample, captions, meta = changed
    cls = meta.get("cls")
    if not is_class_number(cls):
        cls = None  # it stays in the JSON; a .cls of it would not be read back
    writer.add(
        key,
        sample.image,
        sample.image_type,
        captions,
        meta,
        cls,
        negative_images=sample.negative_images,
        further=sample.further(),
    )


def check_names(sources: list[Path]) -> None:
    """Refuse shards of one name to a tool whose files are named after them: two would overwrite
    each other's. ValueError.
    """
    names = Counter(path.stem for path in sources)
    repeated = [name for name, n in names.items() if n > 1]
    if repeated:
        raise ValueError(
            f"several shards are called {repeated[0]}; "
            "give each folder of shards a folder of its own with --to"
        )


def claim(folder: Path, tool: str, sources: list[Path], settings: dict[str, Any]) -> None:
    """Make `folder` this tool's output, or take up unfinished work; raises where it holds something
    else.
    """
    if folder.resolve() in {path.parent.resolve() for path in sources}:
        raise ValueError(f"{folder} holds the input; name another folder, the input stays as it is")
    # Sources are compared by name and size, so that a data set may move between two calls.
    tables = [fetched.beside(path) for path in sources]
    parts = [*sources, *(table for table in tables if table)]
    sizes = [[path.name, path.stat().st_size] for path in parts]
    claimed = {"settings": without_secrets(settings), "sources": sizes}
    claimed = json.loads(json.dumps(claimed))  # as it will be read back

    note = folder / f"_{tool}.json"
    # Looked up before the note: another machine writes the note first.
    holds_shards = any(folder.glob("*.tar"))
    if note.exists():
        before = read_note(note)
        if before != claimed:
            raise ValueError(
                f"{folder} was made from other input or settings "
                f"({_differences(before, claimed)[:600]}); name another folder"
            )
        return

    if holds_shards:
        raise FileExistsError(
            f"{folder} already holds shards that `vlp data {tool}` did not make; "
            "name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(claimed, indent=1).encode())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """How two claims differ, in words."""
    # The one before may have been edited.
    old, new = (
        {**(claim.get("settings") or {}), "sources": claim.get("sources")}
        for claim in (before, now)
    )
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)!r} then, {new.get(name)!r} now" for name in names)


def jobs(sources: list[Path], folder: Path, tool: str) -> list[Job]:
    """A job for every shard: (its number, its path), with a mark in `folder`."""
    return [
        Job(folder / f"{i:05d}_{tool}.json", (i, path), path.stat().st_size, str(path))
        for i, path in enumerate(sources)
    ]


def transform(
    sources: list[Path], folder: Path, tool: str, change: Change, pool: Pool
) -> list[Result | None]:
    """Write this machine's source shards, changed, into the claimed `folder`; returns what
    `carry_out` returns.
    """
    write = partial(_one, folder=folder, change=change)
    results = carry_out(tool, jobs(sources, folder, tool), write, pool)

    # Whoever finishes last indexes the folder; None is a shard of another machine.
    if None not in results:
        index_written(sorted(folder.glob("*.tar")))
    return results


def _one(job: tuple[int, Path], *, folder: Path, change: Change) -> Result:
    """Write the output shard of one input shard."""
    number, path = job
    counts: Counter[str] = Counter()
    writer = ShardWriter(folder, sys.maxsize, first_shard=number, overwrite=True, indexed=False)
    with writer:
        for changed in change(samples(path, counts, rewritten=True), number, counts):
            put(writer, changed, changed.sample.key)
            counts["samples written"] += 1
    return {"counts": counts}
