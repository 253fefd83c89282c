"""What the order costs a loader process: the samples of its own rows of one step.

    python tests/benchmarks/order.py [--repeats 200] [--publish]

Sources are numbers without samples, so that billions need no data. Measured on one core is what a
process of one rank of many computes before it reads: 128 rows of a global batch of ten weighted
sources, each step another one, so that nothing is found in a cache. The sizes of the sources, then
that of the global batch grow; a slope of 0 says that neither matters. For comparison: the whole
batch, which a process needs only where a sample is bad.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, the folder of this file stands first on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import report
from vlp.data.mix import Mixture
from vlp.data.sources import Source
from vlp.types import Sample

N_SOURCES = 10
ROWS = 128
SOURCE_SIZES = [5_000_000, 50_000_000, 500_000_000, 5_000_000_000]
BATCHES = [16_384, 65_536, 262_144, 1_048_576]
# Of no common denominator: shares that no batch divides.
WEIGHTS: list[float | None] = [0.31, 0.17, 0.13, 0.11, 0.09, 0.07, 0.05, 0.04, 0.02, 0.01]


class Numbers(Source):
    """A source of n samples without content."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Sample:
        return Sample(i, str(i), b"", "png", ("",))

    def fingerprint(self) -> str:
        return str(self.n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=200, help="steps measured for each line")
    report.add_arguments(parser)
    args = parser.parse_args()

    rows = [measured(n, BATCHES[-1], args.repeats) for n in SOURCE_SIZES]
    rows += [measured(SOURCE_SIZES[-1], batch, args.repeats) for batch in BATCHES[:-1]]

    by_size = sorted(rows[: len(SOURCE_SIZES)], key=lambda row: row["samples a source"])
    same_size = [row for row in rows if row["samples a source"] == SOURCE_SIZES[-1]]
    by_batch = sorted(same_size, key=lambda row: row["global batch"])
    of_samples = slope(by_size, "samples a source", "weighted, ms (median)")
    of_batch = slope(by_batch, "global batch", "weighted, ms (median)")
    of_whole = slope(by_batch, "global batch", "whole batch, ms")

    notes = (
        f"{N_SOURCES} sources, {ROWS} rows of a rank, {args.repeats} steps a line, on one core. "
        f"Log-log slopes of the weighted median: {of_samples:.2f} of the samples, "
        f"{of_batch:.2f} of the global batch ({of_whole:.2f} for the whole batch). By the clock a "
        "step may be longer than its work by the 4 ms or more for which the system gives the core "
        "to another process; CPU times leave that out."
    )
    report.publish("order", "Order: a process's own rows of a step", rows, args, notes)


def measured(source_size: int, batch: int, repeats: int) -> dict[str, Any]:
    """The line of a size of the sources and one of the batch."""
    sources: list[Source] = [Numbers(source_size) for _ in range(N_SOURCES)]
    weighted = Mixture(sources, WEIGHTS, seed=0)
    epochs = Mixture(sources, [None] * N_SOURCES, seed=0)

    # Of a rank in the middle.
    own_rows = range(batch // 2, batch // 2 + ROWS)
    times, cpu_times = durations(lambda step: weighted.rows(step, batch, own_rows), repeats)
    epoch_times, _ = durations(lambda step: epochs.rows(step, batch, own_rows), repeats)
    whole_times, _ = durations(lambda step: weighted.batch(step, batch), 1)
    return {
        "samples a source": source_size,
        "global batch": batch,
        "weighted, ms (median)": statistics.median(times),
        "weighted, ms (95 %)": float(np.percentile(times, 95)),
        "weighted, CPU ms (95 %)": float(np.percentile(cpu_times, 95)),
        "weighted, CPU ms (worst)": max(cpu_times),
        "every sample once, ms (median)": statistics.median(epoch_times),
        "whole batch, ms": whole_times[0],
    }


def durations(draw: Callable[[int], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of `draw` at so many different steps, after a first one: by the clock, in which
    the core may be another process's, and of this thread's work alone.
    """
    draw(0)
    by_clock, of_work = [], []
    for i in range(repeats):
        # Far apart, as of a run that is resumed: the first of a source's epochs costs no less.
        step = 1 + i * 101
        started, work_before = time.perf_counter(), time.thread_time()
        draw(step)
        of_work.append(1e3 * (time.thread_time() - work_before))
        by_clock.append(1e3 * (time.perf_counter() - started))
    return by_clock, of_work


def slope(rows: list[dict[str, Any]], size: str, measure: str) -> float:
    """The exponent with which one column grows with another."""
    return report.slope([row[size] for row in rows], [row[measure] for row in rows])


if __name__ == "__main__":
    main()
