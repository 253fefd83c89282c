"""Two published towers, locked and aligned: configs/align_towers.yaml over several seeds, measured
on photos that it did not see.

    python tests/benchmarks/align_towers.py --seeds 0 1 2

Packs the data that VLP_DATA names (default ../shared/data) into data/, embeds its pictures once as
the recipe's header says, trains runs/align_towers/seed* where they do not exist yet (an interrupted
one goes on), and reads the scores from results.json. Training seconds are those of the steps,
without evaluation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import caltech101, report
from tests.benchmarks.caltech101 import DATA, SOURCE

RUNS = Path("runs/align_towers")
HELD_OUT = DATA / "coco_held_out"
CHOICES = DATA / "sugarcrepe_held_out.jsonl"
# Label of an evaluation, its metric, and the name of the score in the table.
SCORES = (
    ("zeroshot", "acc1", "Caltech 101 zero-shot top-1, %"),
    ("zeroshot", "mean_per_class_recall", "Caltech 101 mean per-class recall, %"),
    ("retrieval", "text_retrieval_recall@1", "COCO photo → caption R@1, %"),
    ("retrieval", "image_retrieval_recall@1", "COCO caption → photo R@1, %"),
    ("sugarcrepe", "mean", "SugarCrepe mean of seven kinds, %"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="seeds trained side by side")
    parser.add_argument("overrides", nargs="*", default=[], help="key=value for vlp train")
    report.add_arguments(parser)
    args = parser.parse_args()

    caltech101.pack()
    pack_coco()
    n_choices = pack_choices()
    overrides = [*store_pictures(), *args.overrides]

    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    with ThreadPoolExecutor(args.parallel) as pool:
        started = [pool.submit(train, seed, overrides, threads) for seed in args.seeds]
    runs = [future.result() for future in started]

    notes = (
        f"{len(runs)} seeds, mean ± standard deviation, {args.parallel} runs side by side on the "
        "cores. Trained on 5,784 photos of Caltech 101 with texts of their class names, and on 55 "
        "photos of COCO with five captions each; pictures are embedded once, so without crops. "
        "Held out: 2,893 photos of the same 100 classes, "
        f"56 photos of COCO with 280 captions, {n_choices} items of SugarCrepe on these photos. "
        "56 photos leave an R@1 uncertain by about 6 points, whatever the seeds say; the image "
        "tower learnt ImageNet's classes, many of which are Caltech's too."
    )
    report.publish("align_towers", "Two published towers, aligned", rows(runs), args, notes)


def pack_coco() -> None:
    """Half of the photos to train on, the other half to test on, drawn by a hash of their names."""
    coco = [str(SOURCE / "coco_open.tar"), "--captions", str(SOURCE / "coco_open.jsonl")]
    halves = {
        DATA / "coco_train": ["--part", "1/2"],
        HELD_OUT: ["--part", "2/2", "--layout", "clip_benchmark"],
    }
    for folder, arguments in halves.items():
        if not folder.exists():
            caltech101.vlp("data", "pack", *coco, *arguments, "--to", str(folder))


def pack_choices() -> int:
    """SugarCrepe's items on photos that were not trained on; returns how many."""
    held_out = set()
    for shard in HELD_OUT.rglob("*.tar"):
        with tarfile.open(shard) as tar:
            described = [member for member in tar if member.name.endswith(".json")]
            held_out |= {json.load(tar.extractfile(member))["image"] for member in described}

    lines = (SOURCE / "sugarcrepe_open.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["image"] in held_out]
    CHOICES.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return len(kept)


def store_pictures() -> list[str]:
    """Embed the pictures of both sources; returns the settings that read them."""
    untrained = RUNS / "untrained"
    if not (untrained / "checkpoints").exists():
        settings = [f"out={untrained}", "train.duration=1", "eval={}"]
        caltech101.vlp("train", "align_towers", *settings)

    settings = ["model.image_tower.precomputed=true"]
    for place, source in enumerate(("caltech101/train", "coco_train")):
        stored = DATA / "align_towers" / source.partition("/")[0]
        model = ["--model", str(untrained), "--to", str(stored)]
        caltech101.vlp("data", "embed", str(DATA / source), *model)
        settings.append(f"data.sources.{place}.embeddings={stored}")
    return settings


def train(seed: int, overrides: list[str], threads: int) -> Path:
    run = RUNS / f"seed{seed}"
    if not (run / "results.json").exists():
        choices = f"eval.sugarcrepe={{data: {CHOICES}, images: {SOURCE / 'coco_open.tar'}}}"
        settings = [f"seed={seed}", f"out={run}", "resume=auto", choices, *overrides]
        caltech101.vlp("train", "align_towers", *settings, threads=threads)
    return run


def rows(runs: list[Path]) -> list[dict[str, Any]]:
    """A row a score, and one of the training time."""
    finals = [caltech101.results(run) for run in runs]
    records = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]
    last = max(record["step"] for record in records[0] if record["kind"] == "train")
    batch = caltech101.global_batch(runs[0])
    seen = f"{last * batch:,}"

    lines = []
    for label, metric, name in SCORES:
        values = [100 * final[label]["metrics"][metric] for final in finals]
        chance = 100 * finals[0][label]["chance"][metric]
        lines.append(caltech101.row(name, seen, values, chance))
    took = [caltech101.seconds(of_run, last, batch) for of_run in records]
    lines.append(caltech101.row("training, s", seen, took, None))
    return lines


if __name__ == "__main__":
    main()
