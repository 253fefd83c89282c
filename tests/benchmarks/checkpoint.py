"""How long training waits for a checkpoint, and what a rank writes, by size and number of ranks.

    python tests/benchmarks/checkpoint.py --widths 128 256 512 --ranks 1 2 4

Real gloo processes hold a model with AdamW's moments under DDP and under FSDP2. The pause of a
rank is the time in which it can make no step: until what it writes is copied to the host. Beside it
stands the copy alone, of all that one rank would have to hold, and the time until the checkpoint
stands. On a CPU nothing travels over a bus; processes share the cores and the disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests import ranks
from tests.benchmarks import report
from tests.test_step import make_batch, make_training, own_rows
from vlp import checkpoint, dist
from vlp.saving import Saver
from vlp.staging import held, saved_bytes
from vlp.step import train_step

LAYERS = 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512], help="of towers")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3, help="saves; the best times count")
    report.add_arguments(parser)
    options = parser.parse_args()

    rows = []
    for width in options.widths:
        for n_ranks in options.ranks:
            for engine in ("ddp", "fsdp2") if n_ranks > 1 else ("ddp",):
                rows.append(row(engine, width, n_ranks, options.repeats))
    notes = (
        f"Towers of {LAYERS} blocks with AdamW's moments; the best of {options.repeats} saves, the "
        "slowest rank's time, after a first one that allocates the memory on the host. Copy: of "
        "the whole state in one process. The ratio is the largest share of a rank in all bytes."
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
        "stands after, s": max(result["stands"] for result in results),
        "written by a rank, MB": max(result["bytes"] for result in results) / 1e6,
        "largest share": max(result["bytes"] for result in results) / total,
    }


def measured(engine: str, width: int, repeats: int, folder: str) -> dict[str, float]:
    """One rank's times and bytes."""
    size = {"width": width, "layers": LAYERS}
    towers = {"image": {**size, "head_width": 32}, "text": {**size, "heads": width // 32}}
    training = make_training(1, engine=engine, double=False, towers=towers)
    train_step(training, make_batch(own_rows()))
    saver = Saver(Path(folder), keep=1)

    pauses, standing = [], []
    for step in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        tensors = held(training, saver.staging)
        pauses.append(time.perf_counter() - started)
        contents = checkpoint.Contents(**tensors, state={"step": step})
        saver.write(step, contents, time.monotonic())
        saver.wait()
        standing.append(time.perf_counter() - started)

    own = f"shard-{dist.rank() + 1:05d}-*" if dist.world_size() > 1 else "*.safetensors"
    files = checkpoint.newest(Path(folder)).glob(own)
    return {
        "pause": min(pauses[1:]),
        "stands": min(standing[1:]),
        "copy": copy_alone(sum(saved_bytes(training).values())),
        "bytes": sum(path.stat().st_size for path in files),
        "whole": sum(saved_bytes(training).values()),
    }


def copy_alone(n_bytes: int) -> float:
    """Seconds to copy as many bytes to memory that is there already, by one process."""
    source = torch.zeros(n_bytes, dtype=torch.uint8)
    target = torch.ones_like(source)
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
