"""How much of a checkpoint a rank reads when it goes on, by engine and number of ranks.

    python tests/benchmarks/resume.py [--width 128] [--ranks 1 2 4] [--publish]

Four gloo processes write a checkpoint of a model with AdamW's moments; as many as a line says go on
from it. Bytes are counted where parts are mapped from their files: of weights, once to see whether
they are finite and once to take them over, and of the moments. "Alone" is each rank reading all
that it holds by itself, as without vlp.pretrained.read_once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from torch import Tensor

from tests import ranks
from tests.benchmarks import report
from tests.engines.test_engines import save
from tests.mapped_bytes import n_bytes_read
from tests.test_step import make_batch, make_training, own_rows
from vlp import checkpoint, resume
from vlp.engines import replicated
from vlp.pretrained.read_once import read_once
from vlp.step import Training, train_step

LAYERS = 6
N_WRITERS = 4
Reading = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=128, help="of towers")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    report.add_arguments(parser)
    options = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ranks.run(N_WRITERS, written, options.width, folder, timeout_s=300)
        for n_ranks in options.ranks:
            for engine in ("ddp", "fsdp2") if n_ranks > 1 else ("ddp",):
                results = ranks.run(n_ranks, read, engine, options.width, folder, timeout_s=300)
                rows.append({"engine": engine, "ranks": n_ranks, **row(results)})
    notes = (
        f"Towers of {LAYERS} blocks, {options.width} wide, written by {N_WRITERS} ranks. MB that a "
        "rank maps from the files, the rank that maps most; hashing, of which each rank has its "
        "share of the files, is not counted. Read / stored: of all ranks together."
    )
    report.publish("resume", "Bytes read to go on from a checkpoint", rows, options, notes)


def row(results: list[dict[str, float]]) -> dict[str, Any]:
    """The columns of a line, of all ranks' counts."""
    largest = {name: max(result[name] for result in results) for name in results[0]}
    total = sum(result["weights"] + result["moments"] for result in results)
    return {
        "weights, MB": largest["stored weights"] / 1e6,
        "finite?, MB": largest["looked at"] / 1e6,
        "taken over, MB": largest["weights"] / 1e6,
        "alone, MB": largest["weights alone"] / 1e6,
        "moments, MB": largest["stored moments"] / 1e6,
        "of moments, MB": largest["moments"] / 1e6,
        "of moments alone, MB": largest["moments alone"] / 1e6,
        "read / stored": total / (largest["stored weights"] + largest["stored moments"]),
    }


def built(engine: str, width: int) -> Training:
    size = {"width": width, "layers": LAYERS}
    towers = {"image": {**size, "head_width": 32}, "text": {**size, "heads": width // 32}}
    return make_training(1, engine=engine, double=False, towers=towers)


def written(width: int, folder: str) -> None:
    """Save a checkpoint after one step."""
    training = built("ddp", width)
    train_step(training, make_batch(own_rows()))
    save(training, Path(folder))


def read(engine: str, width: int, folder: str) -> dict[str, float]:
    """Bytes that one rank reads, and bytes that are stored."""
    path = checkpoint.newest(Path(folder))
    assert path is not None
    contents = checkpoint.load(path, verified=True)
    training = built(engine, width)
    model = training.engine.evaluation_model()

    def weights(reading: Reading) -> None:
        checkpoint.restore(model, reading(contents.model), path)

    def moments(reading: Reading) -> None:
        with patch.object(replicated, "read_once", reading):
            training.engine.load_moments(contents.optimizer)

    def alone(stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return stored

    return {
        "stored weights": sum(value.nbytes for value in contents.model.values()),
        "stored moments": sum(value.nbytes for value in contents.optimizer.values()),
        "looked at": n_bytes_read(lambda: resume._spoilt(path, contents.model)),
        "weights": n_bytes_read(lambda: weights(read_once)),
        "weights alone": n_bytes_read(lambda: weights(alone)),
        "moments": n_bytes_read(lambda: moments(read_once)),
        "moments alone": n_bytes_read(lambda: moments(alone)),
    }


if __name__ == "__main__":
    main()
