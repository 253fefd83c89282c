"""What the tools of `vlp data` gain from processes, and from a Ray cluster of two nodes.

    python tests/benchmarks/ray_tools.py [--sizes 2000 …] [--embedded 200 …] [--publish]

Two tools, one without a model (`filter`, of two rounds: which captions repeat, then the shards) and
one with (`embed`, a tiny CLIP with random weights), go over the same eight shards three times: in
one process, in two processes of this machine, and on a cluster whose two nodes have a core each, as
Ray's `cluster_utils` starts them here. Each on one thread a process, so that two of them can be at
most twice as fast as one, and on a machine of two cores less: Ray's own processes want a share.

Start-up is the time of the same call over eight shards of one sample each: to start processes, and
to load libraries and the model there. What this process has imported, and the start of the cluster,
are not counted. The outputs of the three are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before numpy and torch are imported here, and in the processes that this one starts.
os.environ["OMP_NUM_THREADS"] = "1"

# Run as a file, the folder of this file stands first on the path.
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

SIZES = [4_000, 8_000, 16_000, 32_000]
EMBEDDED = [2_000, 4_000, 8_000, 16_000]
N_SHARDS = 8
ENGINES = ("1 process", "2 processes", "Ray, 2 nodes")
LEAST_S = 0.5  # of work after start-up, and
LEAST_SHARE = 0.5  # of the start-up, which differs by a quarter: less tells nothing


def main() -> None:
    from tests.benchmarks import report
    from tests.data_tools.ray_cluster import joined

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="samples of filter")
    parser.add_argument("--embedded", type=int, nargs="+", default=EMBEDDED, help="and of embed")
    report.add_arguments(parser)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.perf_counter()
        with joined() as cluster:
            cluster_s = time.perf_counter() - begun
            options = {"filter": ["--max-repeats", "1000", "--min-words", "2"]}
            rows = of_tool(folder, "filter", args.sizes, options["filter"], cluster.address)
            options["embed"] = ["--model", f"local-dir:{_model(folder)}", "--device", "cpu"]
            rows += of_tool(folder, "embed", args.embedded, options["embed"], cluster.address)

    slopes = "; ".join(f"{tool}, {engine}: {slope(rows, tool, engine)}" for tool, engine in _both())
    notes = (
        f"{N_SHARDS} shards, one thread a process. Rows a second count the time after start-up; "
        "the ratio is that to one process at the same size; both are left out where start-up was "
        "most of the call. Log-log slopes of the seconds after start-up over the sizes: "
        f"{slopes}. The cluster itself, two nodes on this machine, took "
        f"{cluster_s:.1f} s to start, which is not counted. All outputs of a size are the same, "
        "byte by byte."
    )
    report.publish("ray_tools", "Tools in processes and on Ray", rows, args, notes)


def _both() -> list[tuple[str, str]]:
    return [(tool, engine) for tool in ("filter", "embed") for engine in ENGINES]


def of_tool(
    folder: Path, tool: str, sizes: list[int], options: list[str], address: str
) -> list[dict[str, Any]]:
    """The lines of a tool: each engine at each size."""
    smallest = write(folder / f"{tool} start", N_SHARDS)
    # Once, so that this process has imported and loaded what it needs.
    seconds(folder, tool, smallest, options, "1 process", address)
    start_s = {
        engine: seconds(folder, tool, smallest, options, engine, address) for engine in ENGINES
    }

    rows = []
    for n in sizes:
        source = write(folder / f"{tool} {n}", n)
        of_size = []
        for engine in ENGINES:
            took_s = seconds(folder, tool, source, options, engine, address)
            of_size.append(line(tool, n, engine, took_s, start_s[engine]))
        rows += with_ratios(of_size)
        _compare(folder / "out")
        shutil.rmtree(source)
    return rows


def line(tool: str, n: int, engine: str, took_s: float, start_s: float) -> dict[str, Any]:
    """A line of the table; without a rate where start-up was most of the time."""
    work_s = took_s - start_s
    tells = work_s >= max(LEAST_S, LEAST_SHARE * start_s)
    row = {"tool": tool, "samples": n, "engine": engine, "seconds": took_s}
    return row | {"start-up, s": start_s, "rows/s": n / work_s if tells else None}


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of one size with the ratios of their rates to that of the first."""
    alone = rows[0]["rows/s"]
    return [
        row | {"ratio": row["rows/s"] / alone if alone and row["rows/s"] else None} for row in rows
    ]


def seconds(
    folder: Path, tool: str, source: Path, options: list[str], engine: str, address: str
) -> float:
    """How long a call takes; its output stays in folder/out/ENGINE."""
    from vlp.cli import main as vlp

    out = folder / "out" / engine
    shutil.rmtree(out, ignore_errors=True)
    where = {
        "1 process": [],
        "2 processes": ["--processes", "2"],
        "Ray, 2 nodes": ["--ray", address],
    }
    command = ["data", tool, str(source), *options, "--to", str(out), *where[engine]]
    with _silent() as told:
        begun = time.perf_counter()
        status = vlp(command)
        took_s = time.perf_counter() - begun
    assert status == 0, told.getvalue()
    return took_s


@contextlib.contextmanager
def _silent() -> Iterator[io.StringIO]:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        yield told


def _compare(out: Path) -> None:
    """Stop where the engines have not written the same."""
    from tests.data_tools.ray_cluster import contents

    first, *others = (contents(out / engine) for engine in ENGINES)
    assert first and all(other == first for other in others), f"outputs in {out} differ"


def write(folder: Path, n: int) -> Path:
    """Shards of n samples with small pictures and captions that repeat."""
    from tests.data.material import encoded, picture
    from vlp.data.format import ShardWriter

    pictures = [encoded(picture(i, (64, 48)), "JPEG") for i in range(64)]
    with ShardWriter(folder, math.ceil(n / N_SHARDS)) as writer:
        for i in range(n):
            text = f"a picture of thing {i % 5000} beside another one of {i % 7}"
            writer.add(None, pictures[i % len(pictures)], "jpg", [text])
    return folder


def _model(folder: Path) -> Path:
    from tests.eval.material import tiny_open_clip

    return tiny_open_clip(folder / "clip")


def slope(rows: list[dict[str, Any]], tool: str, engine: str) -> str:
    """The exponent of growth of the time after start-up, or "too few lines" with a rate."""
    from tests.benchmarks import report

    known = [
        row
        for row in rows
        if (row["tool"], row["engine"]) == (tool, engine) and row["rows/s"] is not None
    ]
    if len(known) < 2:
        return "too few lines"
    times = [row["samples"] / row["rows/s"] for row in known]
    return f"{report.slope([row['samples'] for row in known], times):.2f}"


if __name__ == "__main__":
    main()
