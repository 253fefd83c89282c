"""open_clip's trainer and ours on the same towers, weights, pairs and order, and what a term adds.

    python tests/benchmarks/beside_open_clip.py --seeds 0 1 2 --publish
    python tests/benchmarks/beside_open_clip.py --table

An A/A test between trainers: scenes of 32 px, two small towers of open_clip, AdamW with a cosine,
float32. Both start a seed from one file of weights, and open_clip's loader reads the pairs in the
order that ours draws. The last arm is ours with another line of the configuration. Every arm is
evaluated by `vlp eval` on the weights that its trainer wrote. CPU seconds are those of training
alone, from the settings to the last checkpoint, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks import evidence, evidence_data, open_clip_trainer, parts, report
from vlp import config, log, plugin
from vlp.config import Config
from vlp.eval import confidence, models
from vlp.eval.embed import Context
from vlp.eval.evaluation import evaluate
from vlp.train import train

RECIPE = Path(__file__).with_suffix(".yaml").resolve()
ARCHITECTURE = Path(__file__).with_suffix(".json").resolve()
PEER = "open_clip"
ARMS = {  # name in the table, and the objective of ours
    PEER: ("open_clip's trainer", "{infonce: {}}"),
    "vlp": ("vlp", "{infonce: {}}"),
    "cuaxu": (
        "vlp, + uniformity, alignment, cross-modal uniformity",
        "{infonce: {}, uniformity: {}, alignment: {}, cross_uniformity: {}}",
    ),
}
SCORES = {  # heading -> outcomes by unit
    "text R@1, %": "retrieval/text_retrieval_recall@1",
    "image R@1, %": "retrieval/image_retrieval_recall@1",
    "zero-shot, %": "zeroshot/acc1",
}
N_STEPS = int(config.load(RECIPE).train.duration.value)
FIRST, LAST = 10, 20  # steps whose mean loss is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--steps", type=int, default=N_STEPS, help="of every run (default: %(default)s)"
    )
    parts.add_arguments(parser, "runs/beside_open_clip")
    args = parser.parse_args()

    out = Path(args.out).resolve()
    runs = {}
    for seed in args.seeds:
        runs |= {f"{arm}_{seed}": part_of(arm, seed, args.steps) for arm in ARMS}
    if not args.table:
        prepare(out, args.seeds, args.steps)
        parts.carry_out(run, runs, out, args.jobs)
    show(out, runs, args)


def part_of(arm: str, seed: int, steps: int) -> dict[str, Any]:
    """What a run depends on."""
    files = {"recipe": RECIPE, "architecture": ARCHITECTURE}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return {"arm": arm, "objective": ARMS[arm][1], "seed": seed, "steps": steps, **hashes}


def prepare(out: Path, seeds: list[int], steps: int) -> None:
    """The scenes, their pictures as files, and each seed's first weights and order of pairs."""
    scenes, pictures = out / "scenes", out / "pictures"
    if not scenes.exists():
        size = ("--size", "32")
        evidence_data.whole(scenes, lambda to: evidence_data.vlp("scenes", "--to", str(to), *size))
    if not pictures.exists():
        evidence_data.whole(pictures, lambda to: open_clip_trainer.unpack(scenes / "train", to))
    for seed in seeds:
        if not start_of(out, seed).exists():
            open_clip_trainer.save_start(ARCHITECTURE, seed, start_of(out, seed))
        order = order_of(out, seed, steps)
        if not order.exists():
            settings = settings_of(out, part_of("vlp", seed, steps), out / "unused")
            part = order.with_suffix(".part")
            open_clip_trainer.write_order(settings, scenes / "train", pictures, part)
            part.rename(order)


def start_of(out: Path, seed: int) -> Path:
    return out / f"start_{seed}.pt"


def order_of(out: Path, seed: int, steps: int) -> Path:
    return out / f"order_{seed}_{steps}.tsv"


def settings_of(out: Path, part: dict[str, Any], to: Path) -> Config:
    """What `vlp train` gets of an arm, and open_clip's trainer as arguments."""
    overrides = [
        f"data.sources.0.path={out / 'scenes' / 'train'}",
        f"model.image_tower.architecture={ARCHITECTURE}",
        f"model.pretrained={ARCHITECTURE}:{start_of(out, part['seed'])}",
        f"objective={part['objective']}",
        f"train.duration={part['steps']}",
        f"seed={part['seed']}",
        f"out={to}",
    ]
    return config.load(RECIPE, overrides)


# --- a run ----------------------------------------------------------------------------------------


def run(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train an arm, and evaluate what it wrote: losses, CPU seconds of training, scores."""
    arm, seed, out = part["arm"], part["seed"], folder.parent
    settings = settings_of(out, part, folder / "run")
    began = time.process_time()
    if arm == PEER:
        start, order = start_of(out, seed), order_of(out, seed, part["steps"])
        weights = open_clip_trainer.train(settings, ARCHITECTURE, start, order, Path(settings.out))
        trained_s = time.process_time() - began
        reference = f"{ARCHITECTURE}:{weights}"
        losses = open_clip_trainer.losses(Path(settings.out))
    else:
        reference = str(train(settings))
        trained_s = time.process_time() - began
        records = log.records(Path(reference) / "metrics.jsonl")
        losses = [record["loss"] for record in records if record["kind"] == "train"]

    tasks = {
        "retrieval": {"data": str(out / "scenes" / "retrieval")},
        "zeroshot": {"data": str(out / "scenes" / "zeroshot")},
    }
    encoder = models.load(reference, torch.device("cpu"), None)
    _, items = evaluate(encoder, plugin.keyed("vlp.eval.tasks", tasks), Context(workers=0))
    kept = {name: items[name].contiguous() for name in SCORES.values()}
    save_file(kept, folder / "items.safetensors")
    return {"losses": losses, "trained_s": trained_s}


# --- the table ------------------------------------------------------------------------------------


def show(out: Path, arms: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table of what has finished, and publish it where that is asked for."""
    records = parts.all_finished(out, arms)
    if not records:
        print(f"no run has finished in {out}")
        return
    of_arms = {arm: runs_of(out, arm, records) for arm in ARMS}
    of_arms = {arm: runs for arm, runs in of_arms.items() if runs}
    rows = [row(ARMS[arm][0], runs, of_arms.get(PEER, [])) for arm, runs in of_arms.items()]

    n_seen = batches_of(records) * config.load(RECIPE).train.batch
    notes = (
        f"Mean ± standard deviation over seeds, {n_seen:,} samples seen. Loss: the mean of the "
        f"first {FIRST} and of the last {LAST} steps, of all terms of an arm. Distances from "
        "open_clip's trainer in points with 95 % of a bootstrap paired over items, each with its "
        "mean over the seeds; retrieval among 300 pictures, 560 pictures of 56 classes zero-shot. "
        "Same towers (open_clip's), "
        "first weights, pairs, order, AdamW (without weight decay), warm-up, cosine, clipping and "
        f"float32. {curves(of_arms)} CPU seconds of training on one thread of a shared "
        "machine; open_clip's trainer reads pictures as files, ours from shards, and ours cuts "
        "padding off texts. Trained at "
        f"{parts.commits(list(records.values()))}."
    )
    report.publish("beside_open_clip", "Beside open_clip's trainer", rows, args, notes)


def runs_of(out: Path, arm: str, records: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished runs of an arm, with their outcomes by unit."""
    return [
        record | {"items": load_file(out / name / "items.safetensors")}
        for name, record in records.items()
        if record["settings"]["arm"] == arm
    ]


def batches_of(records: dict[str, Any]) -> int:
    return len(next(iter(records.values()))["losses"])


def row(title: str, runs: list[dict[str, Any]], peers: list[dict[str, Any]]) -> dict[str, Any]:
    """An arm's losses, scores, distances from open_clip's trainer, and CPU seconds."""
    first = [statistics.mean(one["losses"][:FIRST]) for one in runs]
    last = [statistics.mean(one["losses"][-LAST:]) for one in runs]
    cells: dict[str, Any] = {
        "arm": title,
        "seeds": len(runs),
        "first loss": evidence.spread(first),
        "last loss": evidence.spread(last),
    }
    for heading, label in SCORES.items():
        cells[heading] = evidence.spread(
            [100 * confidence.score(one["items"][label]) for one in runs]
        )
    for heading, label in SCORES.items():
        cells[evidence.distance_heading(heading)] = distance(runs, peers, label)
    cells["CPU s"] = evidence.spread([one["trained_s"] for one in runs])
    return cells


def distance(runs: list[dict[str, Any]], peers: list[dict[str, Any]], label: str) -> str | None:
    """A score minus the peer's with its 95 % interval, paired over items."""
    if runs is peers or len(runs) != len(peers):
        return None
    means = (torch.stack([one["items"][label] for one in side]).mean(0) for side in (runs, peers))
    middle, low, high = (100 * value for value in confidence.paired_difference(*means))
    return f"{middle:+.1f} ({low:+.1f} to {high:+.1f})"


def curves(of_arms: dict[str, list[dict[str, Any]]]) -> str:
    """How far the loss curves of the two trainers lie apart, beside those of two seeds."""
    if PEER not in of_arms or len(of_arms[PEER]) != len(of_arms.get("vlp", [])):
        return ""
    theirs, ours = (torch.tensor([one["losses"] for one in of_arms[arm]]) for arm in (PEER, "vlp"))
    gaps = (theirs - ours).abs()
    between_trainers = float(gaps.square().mean().sqrt())
    sentence = (
        f"The two curves of a seed differ by at most {gaps[:, :FIRST].max():.1g} in the first "
        f"{FIRST} steps and by {between_trainers:.2g} over all (root mean square)"
    )
    if len(theirs) == 1:
        return f"{sentence}."
    between_seeds = float((theirs - theirs.roll(1, 0)).square().mean().sqrt())
    return f"{sentence}; those of two seeds by {between_seeds:.2g}."


if __name__ == "__main__":
    main()
