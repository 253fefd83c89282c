"""`vlp data reshard`: shards, also compressed ones, → shards of another size, in the same order or
shuffled by a seed.

The order of all samples is fixed first (20 bytes a sample of memory, 60 while shuffling), then
every new shard is made by itself, so that machines and processes share the work and a killed call
goes on. Shuffled, every sample is read from its own place: slow on disks that turn, and from remote
shards.

Parquet files that img2dataset wrote beside the shards complete their samples. Sounds, frames and
arrays of numbers go along with their samples, as they are. Pictures keep their bytes, unless
`--max-side` shrinks them once for all epochs, or `--format` asks for another.

Samples of one "origin" that lie side by side are a family, which stays together: a shuffle moves it
as a whole, and no cut between two shards goes through it, so that `data.together` finds it. A
family larger than a shard gets a larger shard.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work
from vlp.data_tools.pack import claims, pictures

if TYPE_CHECKING:
    import numpy as np

    from vlp.data.members import Content, Picture
    from vlp.data.rows import Shard
    from vlp.data_tools._run.carried import Carried

HELP = "write shards of another number of samples or bytes, in order or shuffled"
EXAMPLE = """vlp data reshard data/raw --to data/train --samples-per-shard 5000 --shuffle 0
  vlp data reshard "a/{000..099}.tar::b" --to data/train --megabytes-per-shard 500 --renumber
  vlp data reshard data/raw --to data/small --max-side 384
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data reshard`."""
    add = parser.add_argument
    work.shards_arguments(parser)

    # Where a shard ends.
    add(
        "--samples-per-shard",
        type=int,
        metavar="N",
        help="default: 10000, unless --megabytes-per-shard is given",
    )
    add(
        "--megabytes-per-shard",
        type=float,
        metavar="MB",
        help="a shard ends before the sample that would exceed this",
    )

    # Order and keys.
    add(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="permute all samples (default: keep their order)",
    )
    add(
        "--renumber",
        action="store_true",
        help="give new keys; the old ones stay in the JSON as source_key",
    )
    pictures.arguments(parser)
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Plan the new shards, write them, and print how many samples they hold."""
    from vlp.data.format import index, index_written
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.carried import Carried
    from vlp.data_tools._run.packed import Unpacked
    from vlp.data_tools._run.shards import claim

    if (args.samples_per_shard or 1) < 1 or (args.megabytes_per_shard or 1) <= 0:
        raise ValueError("--samples-per-shard and --megabytes-per-shard must be above 0")
    written = pictures.Pictures.of(args)

    # Ten thousand samples, unless a size in bytes says where a shard ends.
    sources, pool, folder = expand(args.source, packed=True), work.pool(args), destination(args.to)
    n_bytes = round((args.megabytes_per_shard or 0) * 1e6)
    limits = {"n_samples": args.samples_per_shard or (0 if n_bytes else 10_000), "n_bytes": n_bytes}
    settings = {**limits, "shuffle": args.shuffle, "renumber": args.renumber}
    if written.change:
        settings |= asdict(written)
    claim(folder, "reshard", sources, settings)

    # Samples are read from their places, which a compressed stream does not have.
    unpacked = Unpacked(folder)
    sources = [unpacked.plain(path) for path in sources]
    shards = index(sources)
    n_problems = sum(shard.n_problems for shard in shards)
    if n_problems:
        print(
            f"{n_problems} problems in the input, which `vlp data validate` names; "
            "what they concern is left out"
        )

    spans = _spans([shard.rows for shard in shards])
    if not len(spans):
        raise ValueError(f"{args.source} holds no usable sample")
    _join_families(spans, list(zip(sources, shards)))
    if args.shuffle is not None:
        spans = spans[_shuffled(spans["family"], args.shuffle)]

    carried = [Carried(path, shard) for path, shard in zip(sources, shards)]
    jobs = _jobs(spans, carried, folder, limits)
    write = Write(list(zip(sources, shards)), carried, folder, args.renumber, written)
    results = work.carry_out("reshard", jobs, write, pool)

    # The unpacked copies are needed until the last machine is done.
    if work.all_done(results):
        index_written(sorted(folder.glob("*.tar")))
        unpacked.remove()
    counts = work.total(results)
    print(work.report(counts, f"{folder}: {len(jobs)} shards"))
    totals = pictures.sum_of(result for result in results if result is not None)
    for line in pictures.loss_of(totals, counts["pictures"]):
        print(line)
    return 0


def _jobs(
    spans: np.ndarray, carried: list[Carried], folder: Path, limits: dict[str, int]
) -> list[work.Job]:
    """A job a new shard. It carries its own places, so that whoever takes it needs nothing else,
    and counts what the shards leave behind whose first sample it has.
    """
    import numpy as np

    jobs = []
    # Without a first sample they are the first job's.
    without_samples = np.setdiff1d(np.arange(len(carried)), spans["shard"]).tolist()
    for number, (start, stop) in enumerate(_cuts(spans["length"], spans["family"], **limits)):
        part = spans[start:stop]
        begun: list[int] = part["shard"][part["number"] == 0].tolist()
        if number == 0:
            begun += without_samples
        left: Counter[str] = Counter()
        for i in begun:
            left.update(carried[i].counts())

        mark = folder / f"{number:05d}_reshard.json"
        jobs.append(work.Job(mark, (number, part, left), int(part["length"].sum())))
    return jobs


def _spans(rows: list[bytes]) -> np.ndarray:
    """(shard, its number in the shard, bytes, family) of every sample, in order; a shard's index
    tells its families.
    """
    import numpy as np

    from vlp.data.rows import CONTINUES, ROW

    # Two columns of the index's rows; the others are passed over.
    fields = {"names": ["length", "flags"], "formats": ["<u4", "<u2"], "offsets": [8, ROW.size - 2]}
    row: np.dtype[np.void] = np.dtype({**fields, "itemsize": ROW.size})  # type: ignore[call-overload]  # a TypedDict for numpy

    kind = np.dtype([("shard", "<u4"), ("number", "<u4"), ("length", "<u4"), ("family", "<u4")])
    spans = np.zeros(sum(map(len, rows)) // ROW.size, kind)
    start = 0
    for shard, data in enumerate(rows):
        columns = np.frombuffer(data, row)
        part = spans[start : start + len(columns)]
        part["shard"] = shard
        part["number"] = np.arange(len(columns))
        part["length"] = columns["length"]
        part["family"] = columns["flags"] & CONTINUES == 0  # 1 where a family begins
        start += len(columns)
    spans["family"] = np.cumsum(spans["family"])
    return spans


def _join_families(spans: np.ndarray, sources: list[tuple[Path, Shard]]) -> None:
    """Let the first family of a shard be the last one of the shard before, where both have one
    origin.
    """
    import numpy as np

    # An index knows families inside its shard only; at the seams the JSON is read.
    firsts = np.flatnonzero(np.diff(spans["shard"]) > 0) + 1
    for first in firsts.tolist():
        origin = _origin(spans[first], sources)
        if origin is not None and origin == _origin(spans[first - 1], sources):
            spans["family"][first:] -= 1


def _origin(span: np.void, sources: list[tuple[Path, Shard]]) -> Any:
    path, shard = sources[span["shard"]]
    with open(path, "rb") as file:
        return shard.sample(file, int(span["number"])).meta.get("origin")


def _shuffled(families: np.ndarray, seed: int) -> np.ndarray:
    """The places of the samples after the families are permuted; within one, samples keep their
    order.
    """
    import numpy as np

    starts = np.flatnonzero(np.diff(families, prepend=-1))

    # Whole families change places: each is spread over its samples, in their order.
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(starts))
    sizes = np.diff(starts, append=len(families))[order]
    within = np.arange(len(families)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts[order], sizes) + within


def _cuts(
    lengths: np.ndarray, families: np.ndarray, n_samples: int, n_bytes: int
) -> list[tuple[int, int]]:
    """(first, end) of each new shard: as many whole families as neither limit forbids (0: none), at
    least one.
    """
    import numpy as np

    starts = np.flatnonzero(np.diff(families.astype(np.int64), prepend=-1))
    bounds = np.append(starts, len(lengths))
    ends = np.cumsum(lengths, dtype=np.int64)
    cuts: list[tuple[int, int]] = []
    start = 0
    while start < len(lengths):
        stop = len(lengths)
        if n_bytes:
            before = ends[start - 1] if start else 0
            stop = int(np.searchsorted(ends, before + n_bytes, "right"))
        if n_samples:
            stop = min(stop, start + n_samples)

        # Back to the last end of a family; where one alone is too large, on to its end.
        end = int(bounds[np.searchsorted(bounds, stop, "right") - 1])
        if end <= start:
            end = int(bounds[np.searchsorted(bounds, start, "right")])
        cuts.append((start, end))
        start = end
    return cuts


@dataclass(frozen=True)
class Write:
    """The work on one new shard."""

    sources: list[tuple[Path, Shard]]
    carried: list[Carried]  # of each
    folder: Path
    renumber: bool
    pictures: pictures.Pictures

    def __call__(self, job: tuple[int, np.ndarray, Counter[str]]) -> work.Result:
        from vlp.data.format import ShardWriter
        from vlp.data_tools._belonging import settle
        from vlp.data_tools._run.shards import Changed, complete, put

        number, spans, left = job
        counts = Counter(left)
        totals: Counter[str] = Counter()
        rows = self._rows_beside(spans, counts)
        with ShardWriter(
            self.folder, len(spans) + 1, first_shard=number, overwrite=True, indexed=False
        ) as writer:
            for source, i, *_ in spans.tolist():
                path, _ = self.sources[source]
                counts["samples read"] += 1
                sample = self._sample(source, i)
                if sample is None:
                    counts["unreadable: samples that changed after they were indexed"] += 1
                    continue

                if row := rows.get((source, sample.key)):
                    complete(sample, row, counts)
                # Its lists must count the captions that are written.
                settle(sample, counts)
                self._write_pictures(sample, counts, totals)
                meta = {**sample.meta, "source_key": sample.key} if self.renumber else sample.meta
                changed = Changed(sample, list(sample.captions), meta)
                try:
                    put(writer, changed, None if self.renumber else sample.key)
                except ValueError as error:
                    advice = "" if self.renumber else "; --renumber gives new keys"
                    raise ValueError(f"{path}: {error}{advice}") from None
                counts["samples written"] += 1
        return {"counts": counts, "totals": totals}

    def _sample(self, source: int, i: int, quiet: bool = False) -> Content | None:
        """Sample i of a source; None, with a warning, where it is not there any more."""
        from vlp import log

        path, shard = self.sources[source]
        try:
            with open(path, "rb") as file:
                sample = shard.sample(file, i)
            sample.further = partial(self.carried[source].of, sample.key)
            return sample
        except ValueError as error:
            if not quiet:
                log.warn(f"{path}: {error}")
            return None

    def _rows_beside(
        self, spans: np.ndarray, counts: Counter[str]
    ) -> dict[tuple[int, str], dict[str, Any]]:
        """What img2dataset noted of these samples, by source and key."""
        from vlp.data.tables import fetched
        from vlp.data_tools._run.shards import rows_beside

        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for source in sorted(set(spans["shard"].tolist())):
            path, _ = self.sources[source]
            if fetched.beside(path) is None:
                continue

            # A shuffle takes a few samples of each shard: their keys first, then only their rows.
            numbers = spans["number"][spans["shard"] == source].tolist()
            samples = [self._sample(source, i, quiet=True) for i in numbers]
            keys = {sample.key for sample in samples if sample is not None}
            by_key = rows_beside(path, counts, keys)
            rows |= {(source, key): row for key, row in by_key.items()}
        return rows

    def _write_pictures(self, sample: Content, counts: Counter[str], totals: Counter[str]) -> None:
        """Put a sample's pictures in the place of those that came, as they are to be written."""
        if not self.pictures.change:
            return
        if sample.image:  # its embedding may stand for it
            written = self._written(sample.image, sample.image_type, counts, totals)
            true = claims.mended(claims.of(sample.meta), sample.image, written.data)
            claims.put(sample.meta, true)
            if true:
                totals["retold"] += 1
            sample.image, sample.image_type = written.data, written.extension
        for place, picture in sample.negative_images.items():
            sample.negative_images[place] = self._written(
                picture.data, picture.extension, counts, totals
            )

    def _written(
        self, data: bytes, image_type: str, counts: Counter[str], totals: Counter[str]
    ) -> Picture:
        """A picture as it is to be written; as it came where it does not open, or where its new
        format cannot hold it.
        """
        from vlp.data.members import Picture
        from vlp.data.picture import BadImage

        counts["pictures"] += 1
        try:
            picture = self.pictures.written(data)
        # Nothing is lost by it: training counts and names what it cannot open.
        except BadImage:
            counts["pictures left as they came, which do not open"] += 1
            return Picture(data, image_type)
        except ValueError:
            counts["pictures left as they came, of more pixels a side than their format holds"] += 1
            return Picture(data, image_type)
        totals.update(picture.numbers)
        return Picture(picture.data, picture.extension or image_type)
