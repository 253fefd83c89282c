"""What a start costs a rank that trains on many shards: time, and memory of its own.

    python tests/benchmarks/index.py [--samples 1000000 10000000 ...] [--publish]

The index of shards of 10,000 samples each is fabricated: tars and rows are holes in sparse files,
for a start reads neither. Measured in a process of its own, behind its imports: opening the source
`shards`, which asks the file system for every shard's size and times, reads the header of the index
and sums up what the samples offer. Private memory is that of /proc/self/smaps_rollup; the page
cache, which all ranks of a machine share, is not counted. `sent` is what each loader process gets
beside shared memory. The last line is extrapolated from the two before it.
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
from typing import Any

# Run as a file, the folder of this file stands first on the path.
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

A_SHARD = 10_000
SAMPLES = [1_000_000, 10_000_000, 100_000_000, 1_000_000_000]
EXTRAPOLATED = 5_000_000_000
TAR_BYTES = 1 << 20


def main() -> None:
    from tests.benchmarks import report

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--repeats", type=int, default=3, help="starts of which the median counts")
    parser.add_argument("--start", metavar="FOLDER", help=argparse.SUPPRESS)
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return

    rows = [measured(n, args.repeats) for n in args.samples]
    columns = ["start, s", "CPU, s", "private memory, MB", "sent to a loader process, MB"]
    sizes = [row["samples"] for row in rows]
    slopes = {column: report.slope(sizes, [row[column] for row in rows]) for column in columns}
    rows.append(extrapolated(rows[-2:], columns))

    shown = "; ".join(f"{column}: {value:.2f}" for column, value in slopes.items())
    notes = (
        f"Shards of {A_SHARD:,} samples on a local disk, median of {args.repeats} starts, memory "
        f"above the imports' own. Log-log slopes over the measured lines: {shown}. The last line "
        "is extrapolated. Where other work loads the machine, CPU seconds tell more."
    )
    report.publish("index", "Index: what a start costs a rank", rows, args, notes)


def measured(n_samples: int, repeats: int) -> dict[str, Any]:
    """The line of a data set of so many samples."""
    n_shards = n_samples // A_SHARD
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fabricate(folder, n_shards)
        command = [sys.executable, __file__, "--start", str(folder)]
        starts = []
        for _ in range(repeats):
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
            starts.append(json.loads(done.stdout))
        assert all(one["samples"] == n_samples for one in starts)
        header_bytes = (folder / "_index.bin").stat().st_size - n_samples * ROW_BYTES

    medians = {name: statistics.median(one[name] for one in starts) for name in starts[0]}
    return {
        "samples": n_samples,
        "shards": n_shards,
        "start, s": medians["start_s"],
        "CPU, s": medians["cpu_s"],
        "private memory, MB": medians["private_bytes"] / 1e6,
        "header of the index, MB": header_bytes / 1e6,
        "sent to a loader process, MB": medians["sent_bytes"] / 1e6,
    }


ROW_BYTES = 24


def fabricate(folder: Path, n_shards: int) -> None:
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
            )
        )

    bodies = [Body(0, shard.order) for shard in shards]
    with (folder / NAME).open("wb") as file:
        file.write(header(shards, bodies))
        file.truncate(file.tell() + n_shards * A_SHARD * ROW_BYTES)


def start(folder: str) -> dict[str, float]:
    """What opening the shards takes in this process."""
    import pickle

    from vlp.config import Captions
    from vlp.data.loader import Loader  # noqa: F401  what a trainer has imported
    from vlp.data.sources.shards import Options
    from vlp.data.sources.shards import open as open_shards

    before = private_bytes()
    started, used = time.perf_counter(), time.process_time()
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
    for column in [*columns, "header of the index, MB"]:
        line[column] = smaller[column] + share * (larger[column] - smaller[column])
    return line


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
