"""The pictures of a pack in chunks that processes share: each picture is checked, and encoded where
that is asked for, before a shard is written.

Below the draft's folder of work (`Draft.made`):

    checked/00000.json    mark of a chunk of all pictures: {"problems": [[place in it, text], …]}
    encoded/00000.made    the new pictures of a chunk of the usable ones, in the order of the shards
    encoded/00000.rows    JSON: where each of its pictures lies there, null for one that stays as it
                          came; then its extension, numbers, and what its JSON must say of it
    encoded/00000.json    mark

A picture that stays as it came is not copied into a chunk, nor is its place noted: the call that
goes on may see the input under another name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from vlp.data import stored, stored_files, stores
from vlp.data.archives import Place, printable
from vlp.data.members import MAX_IMAGE_BYTES
from vlp.data.stored import StoredPath
from vlp.data_tools._run.shards import windows
from vlp.data_tools._run.work import Job, Pool, Result, all_done, carry_out
from vlp.data_tools.pack import claims
from vlp.data_tools.pack.claims import Claims
from vlp.files import replacing, write_atomically

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named
    from vlp.data_tools.pack.pictures import Pictures, Written

SIZE = 256  # pictures of a chunk
_UNIT = "chunks"
_AHEAD = 64  # pictures that are held until they are written
_MAX_THREADS = 8


@dataclass(frozen=True)
class Inputs:
    """The pictures that are packed, for processes that may see them under another name."""

    archive: Archive
    address: str = ""  # of the tar, where what is read here is a copy from a store
    # Where the pictures of a folder in a store are brought, to stay; None: for each use of them.
    copies: Path | None = None

    def place(self, name: str) -> Place:
        """Where the picture of a stored name lies."""
        place = self.archive.place(name)
        return place._replace(path=self.address) if self.address else place

    def state(self, name: str) -> list[int | str]:
        """What changes where another picture takes the place of this one."""
        place = self.place(name)
        if version := self.archive.versions.get(name):
            return [place.size, version]
        status = stored.source(place.path).stat()
        return [status.st_size, status.st_mtime_ns]


@contextmanager
def here(places: Sequence[Place], copies: Path | None) -> Iterator[list[Place]]:
    """The places of pictures on this machine while the block runs. What lies in a store is fetched:
    a tar once, pictures side by side into `copies`, else into a folder that goes with the block.
    Raises OSError where the store fails.
    """
    if not any(map(_is_file_of_store, places)):
        yield [_in_copy_of_tar(place) for place in places]
        return

    folder = TemporaryDirectory(dir=_scratch()) if copies is None else nullcontext(str(copies))
    with folder as name:
        # What no picture can be is not worth fetching.
        fetched = [
            place
            for place in places
            if _is_file_of_store(place) and 0 < place.size <= MAX_IMAGE_BYTES
        ]
        files = stored_files.copies([(place.path, place.size) for place in fetched], Path(name))
        local = {
            place: place._replace(path=str(file))
            for place, file in zip(fetched, files, strict=True)
        }
        yield [local.get(place, place) for place in places]


@cache
def _scratch() -> Path:
    """A folder of this process for what it fetches."""
    return stored.new_scratch()


def _is_file_of_store(place: Place) -> bool:
    """Whether a place is a whole file of a store. In a tar a header goes before each member."""
    return place.offset == 0 and stores.is_address(place.path)


def _in_copy_of_tar(place: Place) -> Place:
    if stores.is_address(place.path):
        place = place._replace(path=os.fspath(stored.source(place.path)))
    return place


class Source(NamedTuple):
    """A picture of the input."""

    name: str
    place: Place
    claims: Claims  # what its JSON says of it, where it may be encoded


class Row(NamedTuple):
    """A picture as it goes into a shard."""

    place: Place
    extension: str  # "": that of its name
    numbers: dict[str, int]  # for the shard's statistics
    true: Claims  # what its JSON must say of it now


class Chunk(NamedTuple):
    """Pictures that one process takes at once."""

    number: int
    sources: list[Source]
    seen: Path  # of the first picture: a node of a cluster is asked whether it is there


def n_threads(pool: Pool) -> int:
    """Threads of a process: Pillow's coders leave the interpreter to others."""
    # A process of a cluster is given one core.
    if pool.ray:
        return 1
    n_cores = os.cpu_count() or 1
    return max(1, min(_MAX_THREADS, n_cores // (pool.processes or 1)))


def usable(
    named: Sequence[Named], inputs: Inputs, pictures: Pictures, folder: Path, pool: Pool
) -> tuple[list[Named], list[str]]:
    """The items whose picture decodes and can be written, and a line for each other. What is known
    of the pictures stays in `folder`.
    """
    work = Check(pictures, n_threads(pool), inputs.copies)
    marks = folder / "checked"
    results = carry_out("check", _jobs(named, inputs, marks), work, pool, _UNIT)
    assert all_done(results)  # all parts of the work are this call's

    usable_items: list[Named] = []
    problems: list[str] = []
    for chunk, result in zip(windows(named, SIZE), results, strict=True):
        problem_at = dict(result["problems"])
        usable_items += [pair for i, pair in enumerate(chunk) if i not in problem_at]
        problems += problem_at.values()
    return usable_items, problems


def encode(
    ordered: Sequence[Named], inputs: Inputs, pictures: Pictures, folder: Path, pool: Pool
) -> Encoded:
    """Encode the pictures of the usable items, which stand as they will in the shards."""
    encoded = Encoded(folder / "encoded", SIZE)
    work = Encode(pictures, encoded.folder, n_threads(pool), inputs.copies)
    jobs = _jobs(ordered, inputs, encoded.folder, with_claims=True)
    carry_out("encode", jobs, work, pool, _UNIT)
    return encoded


@dataclass(frozen=True)
class Encoded:
    """The encoded pictures of all shards."""

    folder: Path
    size: int  # pictures of a chunk, but for the last

    @contextmanager
    def rows(self, start: int, places: Sequence[Place]) -> Iterator[Iterator[Row]]:
        """Those from the `start`-th on, which lie where their rows say while the block runs.
        `places`: of the same pictures in the input.
        """
        if not isinstance(self.folder, StoredPath):
            yield self._rows(start, places, self.folder)
            return

        # Copies of this process alone, which go with it: there would soon be those of all chunks.
        scratch = self.folder.local()
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=scratch) as copies:
            yield self._rows(start, places, Path(copies))

    def _rows(self, start: int, places: Sequence[Place], here: Path) -> Iterator[Row]:
        """`here`: the folder to read from, with copies of what lies in a store."""
        stop = start + len(places)
        in_input = iter(places)
        for number in range(start // self.size, -(-stop // self.size)):
            made = here / f"{number:05d}.made"
            if here != self.folder:
                stores.fetch(str(self.folder / made.name), made)

            rows = json.loads((self.folder / f"{number:05d}.rows").read_bytes())
            first = number * self.size
            for span, *about in rows[max(start - first, 0) : stop - first]:
                place = next(in_input)
                if span is not None:
                    place = Place(str(made), *span)
                yield Row(place, *about)


def _jobs(
    named: Sequence[Named], inputs: Inputs, marks: Path, with_claims: bool = False
) -> list[Job]:
    """A job a chunk, as large as it has pictures."""
    marks.mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, pairs in enumerate(windows(named, SIZE)):
        sources = [
            Source(name, inputs.place(name), claims.of(item.meta) if with_claims else {})
            for item, name in pairs
        ]
        chunk = Chunk(number, sources, stored.source(sources[0].place.path))
        about = printable(f"images {sources[0].name!r} to {sources[-1].name!r}")
        jobs.append(Job(marks / f"{number:05d}.json", chunk, len(sources), about))
    return jobs


@dataclass(frozen=True)
class Check:
    """Finds what of a chunk cannot be used."""

    pictures: Pictures
    n_threads: int
    copies: Path | None

    def __call__(self, chunk: Chunk) -> Result:
        # A store that fails says nothing of the pictures: marks would leave them out for good.
        places = [source.place for source in chunk.sources]
        with here(places, self.copies) as there, ThreadPoolExecutor(self.n_threads) as threads:
            texts = list(threads.map(self._problem, chunk.sources, there))
        problems = [[i, text] for i, text in enumerate(texts) if text]
        return {"counts": {"samples read": len(texts)}, "problems": problems}

    def _problem(self, source: Source, place: Place) -> str:
        """Why a picture, which lies at `place`, cannot be used; empty where it can."""
        from vlp.data.picture import array

        try:
            data = place.read()
            # Of a JPEG every byte is read all the same, in a third of the time.
            array(data, shrink=8)
            self.pictures.refuse(data)
        except (ValueError, OSError) as error:
            return _unusable(source, error)
        return ""


@dataclass(frozen=True)
class Encode:
    """Shrinks and encodes the pictures of a chunk into one file."""

    pictures: Pictures
    folder: Path
    n_threads: int
    copies: Path | None

    def __call__(self, chunk: Chunk) -> Result:
        path = self.folder / f"{chunk.number:05d}.made"
        rows: list[tuple[tuple[int, int] | None, str, dict[str, int], Claims]] = []
        with (
            replacing(path) as temporary,
            open(temporary, "wb") as file,
            ThreadPoolExecutor(self.n_threads) as threads,
        ):
            for sources in windows(chunk.sources, _AHEAD):
                with here([source.place for source in sources], self.copies) as there:
                    made = list(threads.map(self._written, sources, there))
                for written, true in made:
                    span = None
                    # Only what is encoded has an extension of its own.
                    if written.extension:
                        span = (file.tell(), len(written.data))
                        file.write(written.data)
                    rows.append((span, written.extension, written.numbers, true))

        write_atomically(path.with_suffix(".rows"), json.dumps(rows).encode())
        return {"counts": {"samples read": len(rows)}}

    def _written(self, source: Source, place: Place) -> tuple[Written, Claims]:
        """A picture, which lies at `place`, as it is written, and what its JSON must say of it."""
        try:
            data = place.read()
            written = self.pictures.written(data)
        except ValueError as error:
            raise ValueError(_unusable(source, error)) from None

        true = claims.mended(source.claims, data, written.data)
        if true:
            written.numbers["retold"] = 1
        return written, true


def _unusable(source: Source, error: Exception) -> str:
    return printable(f"image {source.name!r} cannot be used: {error}")
