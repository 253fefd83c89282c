"""Whole evaluation commands: `vlp eval` beside `clip_benchmark eval`, in one run.

    python tests/benchmarks/eval_speed.py PHOTOS.tar --peer clip_benchmark

Both get the same checkpoint of open_clip's form with random weights, the same photos in
clip_benchmark's layout, as many workers and photos a batch, float32 and one thread of arithmetic,
and must find the same accuracy. Counted are the CPU seconds of a whole command with its children,
which other load on the machine changes less than the clock. The sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import photos, report
from tests.eval import material
from vlp.eval.pictures import open_archive, picture_of

CLASSES = ["cat", "dog", "plane", "cup", "tree"]
BATCH = 64
# tower -> open_clip's configuration; the small one leaves most of the time to the photos
TOWERS: dict[str, dict[str, Any]] = {
    "small": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    },
    "ViT-B/32": open_clip.get_model_config("ViT-B-32"),
}
PHOTOS = {"small": 4096, "ViT-B/32": 128}
Command = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", metavar="TAR", help="a .tar or a folder of JPEGs")
    parser.add_argument("--peer", default="clip_benchmark", help="clip_benchmark's command")
    parser.add_argument("--towers", nargs="+", default=list(TOWERS), choices=list(TOWERS))
    parser.add_argument("--limit", type=int, help=f"photos (default: {PHOTOS})")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    report.add_arguments(parser)
    options = parser.parse_args()

    # A section a tower, so that one of them can be measured again alone.
    for tower in options.towers:
        limit = options.limit or PHOTOS[tower]
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", TOWERS[tower])
            write_photos(Path(folder) / "set", options.photos, limit)
            rows = measure(tower, Path(folder), limit, options)

        name = tower.lower().replace("/", "").replace("-", "_")
        title = f"Evaluation, whole commands, {tower} tower, beside clip_benchmark"
        report.publish(f"eval_speed_{name}", title, rows, options, notes_on(options))


def notes_on(options: argparse.Namespace) -> str:
    return (
        f"Whole commands, {options.workers} workers, batches of {BATCH}, float32, one thread of "
        f"arithmetic; medians of {options.repeats} turns, ± the standard deviation of the turns' "
        "ratios. Nothing is kept between turns; both sides find the same accuracy."
    )


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A model of open_clip's form with random weights, as `local-dir:` reads it."""
    torch.manual_seed(0)
    tower = open_clip.CLIP(**config)
    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in tower.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def write_photos(folder: Path, source: str, limit: int) -> None:
    """Photos with made-up classes in clip_benchmark's layout."""
    archive = open_archive(source)
    names = [name for name in archive.names if name.lower().endswith((".jpg", ".jpeg"))][:limit]
    if len(names) < limit:
        raise SystemExit(f"{source} holds {len(names)} JPEGs; expected at least {limit}")
    samples: list[tuple[bytes, object]] = [
        (picture_of(archive, name).read(), number % len(CLASSES))
        for number, name in enumerate(names)
    ]
    material.clip_benchmark_set(folder, samples, classes=CLASSES, templates=["a photo of a {c}."])


def commands(root: Path, options: argparse.Namespace) -> dict[str, Command]:
    """The command of either side."""
    vlp = str(Path(sys.executable).with_name("vlp"))
    model, data, workers = f"local-dir:{root / 'model'}", str(root / "set"), str(options.workers)
    ours = [vlp, "eval", model, "--task", "zeroshot", "--data", data, "--cache", "none"]
    ours += ["--workers", workers, "--batch", str(BATCH), "--out", str(root / "vlp.json")]
    peers = [options.peer, "eval", "--dataset", "wds/set", "--dataset_root", data]
    peers += ["--split", "test", "--task", "zeroshot_classification", "--model", model]
    peers += ["--pretrained", "", "--no_amp", "--num_workers", workers]
    peers += ["--batch_size", str(BATCH), "--output", str(root / "clip_benchmark.json")]
    return {"vlp": ours, "clip_benchmark": peers}


def measure(
    tower: str, root: Path, limit: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a side."""
    sides = commands(root, options)
    seconds: dict[str, list[float]] = {name: [] for name in sides}

    for turn in range(options.repeats):
        for name, command in sides.items():
            start = photos.cpu_seconds()
            run(command)
            taken = photos.cpu_seconds() - start
            print(f"{tower}, turn {turn}: {name} {taken:.1f} CPU s", file=sys.stderr, flush=True)
            seconds[name].append(taken)

    scores = {name: accuracy(root / f"{name}.json") for name in sides}
    if abs(scores["vlp"] - scores["clip_benchmark"]) > 1.5 / limit:
        raise SystemExit(f"the sides found different accuracies: {scores}")

    ratios = [theirs / ours for ours, theirs in zip(seconds["vlp"], seconds["clip_benchmark"])]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = f"{statistics.median(ratios):.2f} ± {spread:.2f}" if name == "vlp" else "1"
        row = {"command": name, "photos": limit, "CPU seconds": median}
        rows.append(row | {"photos a CPU-second": limit / median, "of clip_benchmark's": ratio})
    return rows


def run(command: Command) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def accuracy(file: Path) -> float:
    return json.loads(file.read_text())["metrics"]["acc1"]


if __name__ == "__main__":
    main()
