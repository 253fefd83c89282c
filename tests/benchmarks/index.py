"""What a start costs a rank that trains on many shards: time, and memory of its own.

    python tests/benchmarks/index.py [--members] [--samples 1000000 10000000 ...] [--publish]

The index of shards of 10,000 samples each is fabricated: tars and rows are holes in sparse files,
for a start reads neither. Measured in a process of its own, behind its imports: opening the source
`shards`, which asks the file system for every shard's size and times, reads the header of the index
and sums up what the samples offer. Private memory is that of /proc/self/smaps_rollup; the page
cache, which all ranks of a machine share, is not counted. `sent` is what each loader process gets
beside shared memory. The last line is extrapolated from the two before it.

--members: what a run pays besides that reads sounds and frames among the members of samples, with
a file of their places that is fabricated as well; and what it costs to make that file, of real tars
of samples of four members.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlp.data.rows import Shard

# Run as a file, the folder of this file stands first on the path.
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

A_SHARD = 10_000
WALKED = 20_000  # samples of real tars
SAMPLES = [1_000_000, 10_000_000, 100_000_000, 1_000_000_000]
EXTRAPOLATED = 5_000_000_000
HEADER = "header of the index, MB"
SENT = "sent to a loader process, MB"
TAR_BYTES = 1 << 20


def main() -> None:
    from tests.benchmarks import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--repeats", type=int, default=3, help="starts of which the median counts")
    parser.add_argument("--members", action="store_true", help="a run that reads sounds and frames")
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, args.members)))
        return

    rows = [measured(n, args.repeats, args.members) for n in args.samples]
    columns = ["start, s", "CPU, s", "private memory, MB"]
    if not args.members:
        columns.append(SENT)
    sizes = [row["samples"] for row in rows]
    slopes = {column: report.slope(sizes, [row[column] for row in rows]) for column in columns}
    rows.append(extrapolated(rows[-2:], columns))

    shown = "; ".join(f"{column}: {value:.2f}" for column, value in slopes.items())
    notes = (
        f"Shards of {A_SHARD:,} samples on a local disk, median of {args.repeats} starts, memory "
        f"above the imports' own. Log-log slopes over the measured lines: {shown}. The last line "
        "is extrapolated. Where other work loads the machine, CPU seconds tell more."
    )
    if args.members:
        made_s = 1e6 / WALKED * walk_s()
        notes += (
            f" Besides the start of the same shards without members. Reading the headers of real "
            f"tars of four members a sample costs {made_s:.0f} CPU seconds a million samples: once "
            "for all processes of a machine, where the file is made."
        )
        for row in rows:
            row["header of the file, MB"] = row.pop(HEADER)
            del row[SENT]  # places of members lie in shared memory
        title = "Index: what sounds and frames among the members add to a start"
        report.publish("index_members", title, rows, args, notes)
        return
    report.publish("index", "Index: what a start costs a rank", rows, args, notes)


def measured(n_samples: int, repeats: int, members: bool) -> dict[str, Any]:
    """The line of a data set of so many samples."""
    n_shards = n_samples // A_SHARD
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = fabricate(folder, n_shards, members)
        header_bytes = (folder / "_index.bin").stat().st_size - n_samples * ROW_BYTES
        command = [sys.executable, __file__, "--start", str(folder)]
        if members:
            header_bytes = fabricate_members(folder, shards)
            command.append("--members")
        starts = []
        for _ in range(repeats):
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            starts.append(json.loads(done.stdout))
        assert all(one["samples"] == n_samples for one in starts)

    medians = {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    return {
        "samples": n_samples,
        "shards": n_shards,
        "start, s": medians["start_s"],
        "CPU, s": medians["cpu_s"],
        "private memory, MB": medians["private_bytes"] / 1e6,
        HEADER: header_bytes / 1e6,
        SENT: medians["sent_bytes"] / 1e6,
    }


ROW_BYTES = 24


def fabricate(folder: Path, n_shards: int, members: bool) -> list[Shard]:
    """Tars without content, and an index that says they hold samples."""
    from vlp.data.index_file import NAME, Body, header
    from vlp.data.rows import Kind, Shard

    shards = []
    for number in range(n_shards):
        path = folder / f"{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(TAR_BYTES)
        status = path.stat()

        digests = [hashlib.sha256(f"{number} {i}".encode()).hexdigest() for i in range(4)]
        keys, texts, content, order = digests
        shards.append(
            Shard(
                path.name,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                count=A_SHARD,
                keys=keys,
                texts=texts,
                content=content,
                forms=[{"captions": 1, "re_caption": 1}, {"captions": 1}],
                kinds=[Kind(0, A_SHARD - 100, 2, 2, 0, 0), Kind(1, 100, 2, 2, 0, 0)],
                order=order,
                left_out=dict(LEFT_OUT) if members else {},
            )
        )

    bodies = [Body(0, shard.order) for shard in shards]
    with (folder / NAME).open("wb") as file:
        file.write(header(shards, bodies))
        file.truncate(file.tell() + n_shards * A_SHARD * ROW_BYTES)
    return shards


def fabricate_members(folder: Path, shards: list[Shard]) -> int:
    """A file that says where the members of these shards lie; the bytes of its header."""
    from vlp.data.member_file import MEMBER, NAME, Body, OfShard, header

    n_bytes = 2 * A_SHARD * MEMBER.itemsize
    found = []
    for shard in shards:
        of_shard = OfShard(shard.name, shard.size, shard.mtime_ns, shard.ctime_ns, shard.order)
        of_shard.n_with_frames, of_shard.frames = A_SHARD // 2, ["jpg"]
        of_shard.sounds = {"": {"wav": A_SHARD}}
        found.append(of_shard)

    bodies = [Body(n_bytes, shard.order) for shard in shards]
    with (folder / NAME).open("wb") as file:
        file.write(header(found, bodies))
        header_bytes = file.tell()
        file.truncate(header_bytes + len(shards) * n_bytes)
    return header_bytes


def walk_s() -> float:
    """CPU seconds in which the members of WALKED samples of real tars are found."""
    from tests.data.material import write_tar
    from vlp.data.index import located
    from vlp.data.member_index import located as located_members

    with tempfile.TemporaryDirectory() as name:
        paths = []
        for first in range(0, WALKED, A_SHARD):
            keys = [f"{i:09d}" for i in range(first, first + A_SHARD)]
            members = [
                (f"{key}.{ending}", b"bytes") for key in keys for ending in ("jpg", *ENDINGS)
            ]
            paths.append(write_tar(Path(name) / f"{first:09d}.tar", members))
        shards = located(paths)
        used = time.process_time()
        found = located_members(paths, shards)
        assert sum(one.n_with_frames for one in found if one is not None) == WALKED
        return time.process_time() - used


LEFT_OUT = {"members .wav": A_SHARD, "members .N.jpg": A_SHARD}
ENDINGS = ("txt", "wav", "0.jpg")


def start(folder: str, members: bool) -> dict[str, float]:
    """What opening the shards takes in this process, or looking for their members after that."""
    import pickle

    from vlp.config import Captions, Frames, Sound
    from vlp.data.loader import Loader  # noqa: F401  what a trainer has imported
    from vlp.data.sources.shards import Options
    from vlp.data.sources.shards import open as open_shards

    source = open_shards(Options(folder), Captions()) if members else None
    before = private_bytes()
    started, used = time.perf_counter(), time.process_time()
    if source is not None:
        source.find_members({"audio": Sound(), "video": Frames(8)})
        assert all(table.n_samples for table in source.members.values())
    else:
        source = open_shards(Options(folder), Captions())
    identity = source.fingerprint()
    start_s = time.perf_counter() - started
    cpu_s = time.process_time() - used
    assert identity

    # Shared memory travels as a handle, which torch's own pickler makes; here it is left out.
    sent = len(pickle.dumps([source.paths, source._contents, source._problems]))
    return {
        "samples": len(source),
        "start_s": start_s,
        "cpu_s": cpu_s,
        "private_bytes": private_bytes() - before,
        "sent_bytes": sent,
    }


def private_bytes() -> int:
    """Memory that only this process has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    of_process = [line.split() for line in lines if line.startswith("Private_")]
    return sum(int(words[1]) << 10 for words in of_process)


def extrapolated(rows: list[dict[str, Any]], columns: list[str]) -> dict[str, Any]:
    """The line of EXTRAPOLATED samples, on the straight line through two others."""
    smaller, larger = rows
    share = (EXTRAPOLATED - smaller["samples"]) / (larger["samples"] - smaller["samples"])
    line: dict[str, Any] = dict.fromkeys(larger)
    line |= {"samples": EXTRAPOLATED, "shards": EXTRAPOLATED // A_SHARD}
    for column in [*columns, HEADER]:
        line[column] = smaller[column] + share * (larger[column] - smaller[column])
    return line


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
