"""Joint example selection against uniform sampling: samples trained, and work, until a fixed
accuracy is reached.

    python tests/benchmarks/jest.py --seeds 0 1 2 --publish

Of 16,000 generated scenes half have the caption of another scene. The reference is jest.yaml on
4,000 other scenes with their own captions, 80 thousand samples. Every arm is jest.yaml for 24
thousand trained samples of the noisy scenes, on one thread a run. Work counts rows: a trained one
as three forward passes, one scored or embedded by the reference as one; training the reference is
not counted. Finished runs in --out are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tests.benchmarks import report

BASE = Path(__file__).with_suffix(".yaml")
BATCH = 128
ARMS = {
    "uniform": "{}",
    "jest, keep 1/2": "{jest: {reference: reference, keep: 0.5, chunks: 8}}",
    "jest, keep 1/5": "{jest: {reference: reference, keep: 0.2, chunks: 8}}",
}
SCORES = {"zero-shot, %": "zeroshot.acc1", "text R@1, %": "retrieval.text_retrieval_recall@1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--jobs", type=int, default=2, help="runs side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        default="runs/jest_benchmark",
        help="folder of data and runs (default: %(default)s)",
    )
    report.add_arguments(parser)
    args = parser.parse_args()
    out = Path(args.out).resolve()
    make_data(out / "data")
    train(
        out,
        "reference",
        "data.sources.0.path=data/clean/train",
        "train.duration=80ksamples",
        "seed=100",
    )
    jobs = [(arm, seed) for seed in args.seeds for arm in ARMS]

    def run(job: tuple[str, int]) -> None:
        arm, seed = job
        train(out, name(arm, seed), f"selection={ARMS[arm]}", f"seed={seed}")

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run, jobs))

    rows = [row for title, key in SCORES.items() for row in compare(out, title, key, args.seeds)]
    notes = (
        f"{len(args.seeds)} seed(s), mean ± standard deviation. The level to reach is the best "
        "score of uniform sampling with the same seed; every arm trains on 24,000 samples. Work in "
        "forward passes: 3 for a trained sample, 1 for a scored one, 1 for one new to the "
        "reference. Training the reference on 80,000 clean samples is not counted."
    )
    report.publish("jest", "Joint example selection on half-noisy scenes", rows, args, notes)


def make_data(folder: Path) -> None:
    """Scenes for the reference and for evaluation, and others of which half have exchanged
    captions.
    """
    if folder.exists():
        return
    part = folder.with_suffix(".part")
    small = ["--val", "8", "--test", "8", "--proofs", "9", "--size", "32"]
    vlp("data", "scenes", "--to", f"{part}/scenes", "--train", "16000", *small)
    vlp(
        "data",
        "scenes",
        "--to",
        f"{part}/clean",
        "--train",
        "4000",
        "--zeroshot",
        "56",
        "--retrieval",
        "8",
        "--seed",
        "1",
        *small,
    )
    exchange_captions(part / "scenes" / "train", part / "noisy")
    part.rename(folder)


def exchange_captions(source: Path, to: Path) -> None:
    """The shards with the captions of a random half of the samples shifted among these."""
    from vlp.data.format import ShardWriter
    from vlp.data_tools._run.shards import samples

    found = [sample for path in sorted(source.glob("*.tar")) for sample in samples(path, Counter())]
    half = random.Random(0).sample(range(len(found)), len(found) // 2)
    captions = {i: found[j].captions for i, j in zip(half, half[1:] + half[:1])}
    with ShardWriter(to) as writer:
        for i, sample in enumerate(found):
            writer.add(
                None, sample.image, sample.image_type, list(captions.get(i, sample.captions)), {}
            )


def name(arm: str, seed: int) -> str:
    return f"{arm.replace(', keep 1/', '_')}_{seed}"


def train(out: Path, run: str, *overrides: str) -> None:
    """A run in the folder `out`, where it has not finished yet."""
    if not (out / run / "results.json").exists():
        vlp("train", str(BASE.resolve()), f"out={run}", "resume=auto", *overrides, cwd=out)


def compare(out: Path, title: str, key: str, seeds: list[int]) -> list[dict[str, Any]]:
    """A row an arm: final score, and what it took to reach the best score of uniform sampling."""
    curves = {(arm, seed): curve(out / name(arm, seed), key) for arm in ARMS for seed in seeds}
    levels = {seed: max(score for _, score in curves["uniform", seed]) for seed in seeds}

    rows = []
    for arm in ARMS:
        reached = [
            next((s for s, score in curves[arm, seed] if score >= levels[seed]), None)
            for seed in seeds
        ]
        hits = (
            None
            if None in reached
            else [(s, s * work(out / name(arm, seed), s)) for s, seed in zip(reached, seeds)]
        )
        samples, passes = (
            (None, None) if hits is None else (round(statistics.mean(part)) for part in zip(*hits))
        )
        rows.append(
            {
                "score": title,
                "arm": arm,
                "at the end": spread([100 * curves[arm, seed][-1][1] for seed in seeds]),
                "samples trained to uniform's best": samples,
                "work a sample": statistics.mean(work(out / name(arm, seed)) for seed in seeds),
                "work to it": passes,
            }
        )

    return rows


def curve(run: Path, key: str) -> list[tuple[int, float]]:
    """(samples trained, score) at every evaluation."""
    return [(r["step"] * BATCH, r[key]) for r in records(run) if r["kind"] == "eval" and key in r]


def work(run: Path, samples: float = math.inf) -> float:
    """Forward passes a trained sample, over the first so many; the reference has more to embed
    early on.
    """
    steps = [r for r in records(run) if r["kind"] == "train" and r["step"] * BATCH <= samples]
    return (
        3
        + statistics.mean(
            r.get("jest.scored_rows", 0) + r.get("jest.reference_rows", 0) for r in steps
        )
        / BATCH
    )


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (
        f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    )


def vlp(*arguments: str, cwd: Path | None = None) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "vlp.cli", *arguments],
        check=True,
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
