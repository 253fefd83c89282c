"""A scaling curve on generated scenes: twelve runs over model size, samples seen and batch, a law
fitted to them, and two larger runs that it has to predict.

    python tests/benchmarks/scaling.py --publish
    python tests/benchmarks/scaling.py --table

Three sizes by three lengths at a batch of 128, and three further batches in the middle. Every point
is a run of its own, so that its cosine ends where the run does. The law (tests/benchmarks/law.py)
is fitted to those twelve alone. The next model size and the next length are run, too, and the table
sets the law's prediction beside what they score. The plot goes to docs/_static with --publish.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import numpy as np

from tests.benchmarks import evidence, evidence_data, law, parts, plots, report
from tests.benchmarks.law import Law, Point
from vlp import config
from vlp.config import Config
from vlp.eval.evaluation import in_training
from vlp.models.build import build
from vlp.train import train

PLOT = report.RESULTS.parent / "_static" / "scaling.svg"
SIZES = {  # image width, layers; text width, layers
    "XS": (64, 2, 48, 1),
    "S": (96, 3, 64, 2),
    "M": (128, 4, 96, 2),
    "L": (192, 4, 128, 2),
}
SAMPLES = (12_288, 24_576, 49_152)
BATCH = 128
GRID = [(size, samples, BATCH) for size in ("XS", "S", "M") for samples in SAMPLES]
GRID += [("S", 24_576, batch) for batch in (64, 256, 512)]
NEXT = [("L", 49_152, BATCH), ("M", 98_304, BATCH)]  # predicted, then run
RATE = 1e-3  # at a batch of 256, as evidence.yaml found it; else by the square root of the batch
ERRORS = {
    "zero-shot error": ("zeroshot", ("acc1",)),
    "retrieval error (1 - R@1, mean of both ways)": (
        "retrieval",
        ("text_retrieval_recall@1", "image_retrieval_recall@1"),
    ),
}
N_PICTURES = {"train": 40_000, "retrieval": 500, "zeroshot": 1120, "proofs": 9}
Place = tuple[str, int, int]  # size, samples seen, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parts.add_arguments(parser, "runs/scaling")
    args = parser.parse_args()

    out = Path(args.out).resolve()
    runs = {name_of(place): part_of(place, args.seed) for place in (*GRID, *NEXT)}
    if not args.table:
        make_scenes(out / "scenes")
        parts.carry_out(run, runs, out, args.jobs)
    show(out, runs, args)


def name_of(place: Place) -> str:
    size, samples, batch = place
    return f"{size}_{samples}_{batch}"


def part_of(place: Place, seed: int) -> dict[str, Any]:
    """What a run depends on."""
    size, samples, batch = place
    return {"size": size, "samples": samples, "batch": batch, "seed": seed, "of": SIZES[size]}


def make_scenes(scenes: Path) -> None:
    if scenes.exists():
        return
    numbers = [f"--{name}={n}" for name, n in N_PICTURES.items()]
    evidence_data.whole(
        scenes, lambda to: evidence_data.vlp("scenes", "--to", str(to), "--size", "32", *numbers)
    )


# --- a run ----------------------------------------------------------------------------------------


def settings_of(part: dict[str, Any], scenes: Path, to: Path) -> Config:
    """evidence.yaml with towers of a size, for so many samples in batches of so many."""
    width, layers, text_width, text_layers = part["of"]
    image = {"name": "vit", "image_size": 32, "patch_size": 8, "head_width": 32}
    text = {"name": "transformer", "context_length": 28, "heads": 4}
    towers = {
        "model.image_tower": image | {"width": width, "layers": layers},
        "model.text_tower": text | {"width": text_width, "layers": text_layers},
    }
    tasks = {name: {"data": str(scenes / name)} for name in ("retrieval", "zeroshot")}
    rate = RATE * math.sqrt(part["batch"] / 256)
    values = {
        **towers,
        "data.sources": [{"name": "shards", "path": str(scenes / "train")}],
        "eval": tasks,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    overrides += [
        f"train.duration={part['samples'] // part['batch']}",
        f"train.batch={part['batch']}",
        f"train.optimizer.lr={rate:.2e}",
        # One for all: which is faster could depend on the size.
        "train.precision=bf16",
        f"seed={part['seed']}",
        f"out={to}",
    ]
    return config.load(evidence.BASE, overrides)


def run(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one point, and evaluate it: errors, scores and parameters."""
    settings = settings_of(part, folder.parent / "scenes", folder / "run")
    finished = train(settings, in_training)
    records = {
        record["label"]: record["metrics"]
        for record in json.loads((finished / "results.json").read_text())
    }
    errors = {}
    for name, (label, scores) in ERRORS.items():
        errors[name] = 1 - sum(records[label][score] for score in scores) / len(scores)
    return {"errors": errors, "parameters": parameters(settings)}


def parameters(settings: Config) -> int:
    """Of the towers without their tables of tokens and positions, which do no arithmetic."""
    named = build(settings.model).named_parameters()
    return sum(value.numel() for name, value in named if "embedding" not in name)


# --- the law and the table ------------------------------------------------------------------------


def show(out: Path, runs: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table and draw the plot, where all that the law is fitted to has finished."""
    records = parts.all_finished(out, runs)
    missing = [name_of(place) for place in GRID if name_of(place) not in records]
    if missing:
        print(f"{len(missing)} of {len(GRID)} runs are still to come: {', '.join(missing)}")
        return
    laws = {error: law.fit([point_of(records, place, error) for place in GRID]) for error in ERRORS}
    rows = [row(records, place, laws) for place in GRID]
    rows += [row(records, place, laws) for place in NEXT if name_of(place) in records]

    scores = "; ".join(f"{error}: {sentence(fitted)}" for error, fitted in laws.items())
    notes = (
        "![Errors over samples seen, by model size: measured, fitted and predicted]"
        f"(_static/{PLOT.name})\n\n"
        "Errors and fitted errors in %; of the last rows, which the fit does not know, the "
        f"predicted error with the middle 95 % of a bootstrap of residuals: {kept(records, laws)}. "
        "Parameters without "
        "tables of tokens and positions. Law: floor + a·(N/1M)^-alpha + b·(D/24k)^-beta·"
        f"(B/128)^gamma; {scores}. One seed a point; 1,120 pictures of 56 classes zero-shot, "
        "retrieval among 500; 40,000 scenes, so that the longest runs see each once or twice; a "
        f"rate of {RATE:g}·√(B/256), not tuned for each point. CPU seconds of a whole run. "
        f"Trained at {parts.commits(list(records.values()))}."
    )
    text = plots.drawing(panels(records, laws), "Errors over samples seen, by model size")
    target = PLOT if args.publish else out / PLOT.name
    target.write_text(text, encoding="utf-8")
    report.publish("scaling", "Scaling on generated scenes", rows, args, notes)


def point_of(records: dict[str, Any], place: Place, error: str) -> Point:
    _, samples, batch = place
    record = records[name_of(place)]
    return Point(record["parameters"], samples, batch, record["errors"][error])


def row(records: dict[str, Any], place: Place, laws: dict[str, Law]) -> dict[str, Any]:
    """A point: measured errors beside those of the law, with intervals where it predicts."""
    size, samples, batch = place
    record = records[name_of(place)]
    cells: dict[str, Any] = {
        "size": size,
        "parameters, M": record["parameters"] / 1e6,
        "samples seen": samples,
        "B": batch,
    }
    for error, fitted in laws.items():
        point = point_of(records, place, error)
        short = error.partition(" (")[0]
        cells[f"{short}, %"] = f"{100 * point.error:.1f}"
        cells[f"{short}: law, %"] = expected(fitted, point, is_predicted=place in NEXT)
    return cells | {"CPU s": record["cpu_s"]}


def kept(records: dict[str, Any], laws: dict[str, Law]) -> str:
    """How many of the predictions came true, as far as their runs have finished."""
    came_true = []
    for error, fitted in laws.items():
        for place in NEXT:
            if name_of(place) in records:
                point = point_of(records, place, error)
                low, high = fitted.interval(point)
                came_true.append(low <= point.error <= high)
    return f"{sum(came_true)} of {len(came_true)} measured errors lie within"


def expected(fitted: Law, point: Point, is_predicted: bool) -> str:
    middle = f"{100 * fitted(point):.1f}"
    if not is_predicted:
        return middle
    low, high = fitted.interval(point)
    return f"{middle} ({100 * low:.1f} to {100 * high:.1f})"


def sentence(fitted: Law) -> str:
    """The exponents and the floor with their intervals, and how well the points follow."""
    shown = []
    for name in ("floor", "alpha", "beta", "gamma"):
        low, high = fitted.bounds(name)
        value = fitted.values[law.NAMES.index(name)]
        shown.append(f"{name} {value:.2f} ({low:.2f} to {high:.2f})")
    return f"{', '.join(shown)}, residuals {100 * fitted.spread:.1f} %"


def panels(records: dict[str, Any], laws: dict[str, Law]) -> list[plots.Panel]:
    return [
        plots.Panel(
            f"{error.partition(' (')[0]} at B = {BATCH}",
            "samples seen (hollow: predicted)",
            [series(records, size, error, fitted) for size in SIZES],
        )
        for error, fitted in laws.items()
    ]


def series(records: dict[str, Any], size: str, error: str, fitted: Law) -> plots.Series:
    """A size's points and the law's line through them; a hollow point is a prediction."""
    places = [
        place
        for place in (*GRID, *NEXT)
        if place[0] == size and place[2] == BATCH and name_of(place) in records
    ]
    marks = []
    for place in places:
        point = point_of(records, place, error)
        marks.append(plots.Mark(point.samples, point.error, hint=f"{100 * point.error:.1f} %"))
        if place in NEXT:
            low, high = fitted.interval(point)
            hint = f"predicted {100 * fitted(point):.1f} %"
            marks.append(plots.Mark(point.samples, fitted(point), low, high, True, hint))

    n_parameters = records[name_of(places[0])]["parameters"] if places else 0
    lengths = np.geomspace(SAMPLES[0], NEXT[-1][1], 24).tolist()
    line = [(at, fitted(Point(n_parameters, at, BATCH))) for at in lengths] if places else []
    is_next = size not in {place[0] for place in GRID}
    return plots.Series(f"{size}, {n_parameters / 1e6:.2f} M", marks, line, is_next)


if __name__ == "__main__":
    main()
