"""How long training waits for a checkpoint, and what a rank writes, by size and number of ranks.

    python tests/benchmarks/checkpoint.py [--widths 64 …] [--ranks 1 2 4] [--publish]

Real gloo processes hold a model with AdamW's moments under DDP and under FSDP2, and make steps. The
pause is the time in which a rank can go on with no step: from the end of one until the next one may
begin, and what its update then still waits for the copy. Beside it stands the copy alone: of the
same tensors to the same memory, on all ranks at once, in the same turns. On a CPU nothing travels
over a bus; processes share the cores and the disk, so that of more ranks than cores the pause holds
turns of the others: the CPU time of the thread that pauses leaves them out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import ranks
from tests.benchmarks import report
from tests.test_step import ROWS, make_batch, make_training, own_rows
from vlp import checkpoint, dist
from vlp.saving import Saver
from vlp.staging import held, saved_bytes
from vlp.step import Training, train_step

WIDTHS = [64, 128, 256, 512]
LAYERS = 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="of towers"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5, help="saves of a line")
    report.add_arguments(parser)
    options = parser.parse_args()

    rows = []
    for width in options.widths:
        for n_ranks in options.ranks:
            for engine in ("ddp", "fsdp2") if n_ranks > 1 else ("ddp",):
                rows.append(row(engine, width, n_ranks, options.repeats))
    slopes = "; ".join(
        f"{engine} × {n_ranks}: {growth(rows, engine, n_ranks)}"
        for engine, n_ranks in dict.fromkeys((row["engine"], row["ranks"]) for row in rows)
    )
    notes = (
        f"Towers of {LAYERS} blocks with AdamW's moments, {ROWS} rows a step; medians of "
        f"{options.repeats} turns, the slowest rank's, after a first one that allocates the memory "
        "on the host. Copy: of what a rank writes, tensor by tensor, to memory that is there, by "
        "all ranks at once and nothing beside it. Pause: asking for a save, and what the next "
        "update waits for its copy, which passes beside that step's forward and backward; its "
        "CPU is what the thread that pauses works in it. The share is the largest of a rank in all "
        f"bytes. Log-log slopes of pause / copy / bytes of a rank over the state: {slopes}."
    )
    report.publish("checkpoint", "Checkpoints beside the steps", rows, options, notes)


def row(engine: str, width: int, n_ranks: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        results = ranks.run(n_ranks, measured, engine, width, repeats, folder, timeout_s=900)
    total = sum(result["bytes"] for result in results)
    return {
        "engine": engine,
        "ranks": n_ranks,
        "state, MB": results[0]["whole"] / 1e6,
        "copy, s": max(result["copy"] for result in results),
        "pause, s": max(result["pause"] for result in results),
        "CPU of it, s": max(result["pause CPU"] for result in results),
        "pause / copy": max(result["pause"] / result["copy"] for result in results),
        "stands after, s": max(result["stands"] for result in results),
        "written by a rank, MB": max(result["bytes"] for result in results) / 1e6,
        "largest share": max(result["bytes"] for result in results) / total,
    }


def growth(rows: list[dict[str, Any]], engine: str, n_ranks: int) -> str:
    """The exponents with which pause, copy and a rank's bytes grow with the state."""
    lines = [row for row in rows if (row["engine"], row["ranks"]) == (engine, n_ranks)]
    sizes = [line["state, MB"] for line in lines]
    columns = ("pause, s", "copy, s", "written by a rank, MB")
    exponents = [report.slope(sizes, [1e3 * line[column] for line in lines]) for column in columns]
    return " / ".join(f"{exponent:.2f}" for exponent in exponents)


def measured(engine: str, width: int, repeats: int, folder: str) -> dict[str, float]:
    """One rank's times and bytes."""
    size = {"width": width, "layers": LAYERS}
    towers = {"image": {**size, "head_width": 32}, "text": {**size, "heads": width // 32}}
    training = make_training(1, engine=engine, double=False, towers=towers)
    batch = make_batch(own_rows())
    train_step(training, batch)
    saver = Saver(Path(folder), keep=1)

    copies, pauses, of_work, standing = [], [], [], []
    for step in range(repeats + 1):
        copies.append(copy_alone(training, saver))

        dist.barrier()
        started, work_before = time.perf_counter(), time.thread_time()
        contents = checkpoint.Contents(**held(training, saver.staging), state={"step": step})
        saver.write(step, contents, time.monotonic())
        asked = time.perf_counter() - started
        worked = time.thread_time() - work_before

        # The step that follows, whose update waits.
        waits: list[float] = []
        training.before_update = partial(timed, saver.staging.wait, waits)
        train_step(training, batch)
        pauses.append(asked + waits[0])
        of_work.append(worked)
        saver.wait()
        standing.append(time.perf_counter() - started)

    own = f"shard-{dist.rank() + 1:05d}-*" if dist.world_size() > 1 else "*.safetensors"
    files = checkpoint.newest(Path(folder)).glob(own)
    return {
        "pause": statistics.median(pauses[1:]),
        "pause CPU": statistics.median(of_work[1:]),
        "stands": statistics.median(standing[1:]),
        "copy": statistics.median(copies[1:]),
        "bytes": sum(path.stat().st_size for path in files),
        "whole": sum(saved_bytes(training).values()),
    }


def copy_alone(training: Training, saver: Saver) -> float:
    """Seconds to copy what this rank writes, while the others do the same."""
    held(training, saver.staging)
    dist.barrier()
    started = time.perf_counter()
    saver.staging.settle()
    return time.perf_counter() - started


def timed(wait: Callable[[], None], seconds: list[float]) -> None:
    """Call `wait`, and note how long it took."""
    started = time.perf_counter()
    wait()
    seconds.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
