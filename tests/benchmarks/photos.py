"""Objectives on real photos with captions: arms that differ in a line of the configuration, over
several seeds, tested on pictures that they did not see.

    VLP_PHOTOS=data/photos python tests/benchmarks/photos.py --publish
    # from scratch, or with any other recipe; settings go to every arm
    python tests/benchmarks/photos.py --photos data/photos --recipe clip.yaml train.duration=10ep

The photos are shards as `vlp data pack` writes them; without any, the few of COCO under VLP_DATA
(default ../shared/data) are packed. They are split by picture (tests/benchmarks/photo_data.py).
Measured are retrieval both ways, zero-shot classes (--zeroshot), and captions against wrong ones:
negatives by rule, other numbers, and SugarCrepe's items where the photos are COCO's. Intervals are
over pictures, distances from the first arm paired over them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.benchmarks import caltech101, evidence_data, parts, photo_data, photo_tables
from vlp import config, plugin
from vlp.config import Config
from vlp.eval import models
from vlp.eval.embed import Context
from vlp.eval.evaluation import evaluate
from vlp.train import train

RECIPE = Path(__file__).with_suffix(".yaml").resolve()
SOURCE = caltech101.SOURCE
ARMS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # name, objective, further settings
    "infonce": ("InfoNCE", "{infonce: {}}", ()),
    "siglip": ("SigLIP", "{siglip: {}}", ("model.scale.init=10", "model.bias=-10")),
    "captions": (
        "captions, mean of four",
        "{captions: {}}",
        ("data.captions={choose: all, n: 4}",),
    ),
    "negclip": ("NegCLIP, negatives by rule", "{hard_negatives: {form: negclip}}", ()),
    "own": ("InfoNCE + own negatives", "{infonce: {}, hard_negatives: {form: own}}", ()),
    "counting": ("InfoNCE + counting", "{infonce: {}, counting: {logits: scaled}}", ()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--photos", default=os.environ.get("VLP_PHOTOS"), help="shards (default: $VLP_PHOTOS)")
    add("--recipe", default=str(RECIPE), help="configuration of every arm (default: %(default)s)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {[*ARMS]}")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--zeroshot", metavar="DATA", help="classes to tell apart (default: Caltech 101's, if any)")
    parts.add_arguments(parser, "runs/photos")
    add("overrides", nargs="*", default=[], help="key=value for every arm")
    args = parser.parse_args()

    out = Path(args.out).resolve()
    try:
        made = photo_data.about(out / "photos") if args.table else prepare(out, args)
    except ValueError as error:
        parser.error(str(error))
    runs = {}
    for seed in args.seeds:
        runs |= {f"{arm}_{seed}": part_of(arm, seed, made, args) for arm in args.arms}
    if not args.table:
        parts.carry_out(run, runs, out, args.jobs)
    titles = {arm: title for arm, (title, *_) in ARMS.items()}
    photo_tables.show(out, runs, titles, made, args)


# --- the data -------------------------------------------------------------------------------------


def prepare(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The folds, and what is tested besides; returns what the folds were made of.

    ValueError where there are no photos, or fewer to train on than a batch takes.
    """
    # What is mistyped is answered before anything is packed.
    for arm in args.arms:
        config.load(args.recipe, overrides_of(arm, args.overrides))
    if args.zeroshot and not Path(args.zeroshot).exists():
        raise ValueError(f"no classes at {args.zeroshot}; --zeroshot names data of that task")

    settings = config.load(args.recipe, args.overrides)
    out.mkdir(parents=True, exist_ok=True)
    photos = Path(args.photos).resolve() if args.photos else packed_coco(out)
    if not photos.exists():
        raise ValueError(
            f"no photos at {photos}; name shards by --photos or VLP_PHOTOS, as `vlp data pack` "
            "writes them"
        )
    table = SOURCE / "sugarcrepe_open.jsonl"
    choices = photo_data.read_choices(table) if table.exists() else {}
    made = photo_data.make(photos, choices, out / "photos")

    n_photos = made["counts"]["photos"]
    n_train = n_photos * (made["parts"] - 1) // made["parts"]
    if n_train < settings.train.batch:
        raise ValueError(
            f"{photos} has {n_photos} photos, of which about {n_train} are trained on, fewer than "
            f"train.batch={settings.train.batch}; name more photos, or a smaller batch"
        )
    if is_stored(args.recipe):
        store_pictures(out, made)
    pack_further_tests(out)
    return made


def packed_coco(out: Path) -> Path:
    """The photos of COCO that are at hand, packed."""
    photos, coco = out / "coco", SOURCE / "coco_open.tar"
    if not photos.exists() and not coco.exists():
        raise ValueError(
            f"no photos: neither --photos nor VLP_PHOTOS names any, and {coco} is absent; pack "
            "some with `vlp data pack`"
        )
    if not photos.exists():
        captions = ("--captions", str(SOURCE / "coco_open.jsonl"))
        pack = ("pack", str(coco), *captions, "--to")
        evidence_data.whole(photos, lambda to: evidence_data.vlp(*pack, str(to)))
    return photos


def pack_further_tests(out: Path) -> None:
    """Classes of Caltech 101 and NLVR's sentences that count, where they are at hand."""
    nlvr, classes = SOURCE / "nlvr.tar", SOURCE / "caltech101.tar"
    if nlvr.exists() and not (out / "nlvr").exists():
        evidence_data.whole(out / "nlvr", pack_sentences)
    if classes.exists() and not (out / "zeroshot").exists():
        evidence_data.whole(out / "zeroshot", pack_classes)


def pack_classes(to: Path) -> None:
    """An eighth of the held-out photos: every run embeds them."""
    held_out = ("--captions", str(SOURCE / "caltech101.jsonl"), "--where", "split=test")
    layout = ("--layout", "clip_benchmark", "--template", "a photo of a {}.")
    archive = str(SOURCE / "caltech101.tar")
    evidence_data.vlp("pack", archive, *held_out, "--part", "1/8", *layout, "--to", str(to))


def pack_sentences(to: Path) -> None:
    """NLVR's sentences that count, beside pictures that they are true of."""
    every = to / "every"
    table = ("--captions", str(SOURCE / "nlvr.jsonl"), "--caption-column", "sentence")
    true_alone = ("--where", "label=true", "--to", str(every))
    evidence_data.vlp("pack", str(SOURCE / "nlvr.tar"), *table, *true_alone)
    counts = photo_data.sentences_that_count(every, to)
    shutil.rmtree(every)
    (to / "counts.json").write_text(json.dumps(counts))


def store_pictures(out: Path, made: dict[str, Any]) -> None:
    """Embed the pictures that are trained on: a locked tower gives the same every time."""
    stores = [stored(out, fold) for fold in made["folds"]]
    if all(store.exists() for store in stores):
        return
    untrained = out / "untrained"
    shutil.rmtree(untrained, ignore_errors=True)
    first = out / "photos" / "0" / "train"
    overrides = [f"data.sources.0.path={first}", f"out={untrained}", "train.duration=1"]
    train(config.load(RECIPE, [*overrides, "train.optimizer.warmup=0"]))
    for fold, store in zip(made["folds"], stores):
        source = out / "photos" / str(fold) / "train"
        embed = ("embed", str(source), "--model", str(untrained), "--to")
        if not store.exists():
            evidence_data.whole(store, lambda to, embed=embed: evidence_data.vlp(*embed, str(to)))
    shutil.rmtree(untrained)


def is_stored(recipe: str) -> bool:
    return Path(recipe).resolve() == RECIPE


def stored(out: Path, fold: int) -> Path:
    return out / "stored" / str(fold)


# --- a run ----------------------------------------------------------------------------------------


def part_of(arm: str, seed: int, made: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """What the models of an arm and a seed depend on."""
    zeroshot = str(Path(args.zeroshot).resolve()) if args.zeroshot else None
    return {
        "arm": arm,
        "seed": seed,
        "overrides": overrides_of(arm, args.overrides),
        # This folder's own is wherever the project is: a moved project goes on.
        "recipe": None if is_stored(args.recipe) else str(Path(args.recipe).resolve()),
        "recipe_hash": hashlib.sha256(Path(args.recipe).read_bytes()).hexdigest(),
        "photos": made["bytes"],
        "folds": made["folds"],
        "zeroshot": zeroshot,
    }


def overrides_of(arm: str, further: list[str]) -> list[str]:
    _, objective, of_arm = ARMS[arm]
    return [f"objective={objective}", *of_arm, *further]


def settings_of(part: dict[str, Any], out: Path, fold: int, to: Path) -> Config:
    """The recipe on a fold's photos."""
    overrides = [f"data.sources.0.path={out / 'photos' / str(fold) / 'train'}"]
    if part["recipe"] is None:
        overrides += [
            "model.image_tower.precomputed=true",
            f"data.sources.0.embeddings={stored(out, fold)}",
        ]
    overrides += [*part["overrides"], f"seed={part['seed']}", "eval={}", f"out={to}"]
    return config.load(part["recipe"] or RECIPE, overrides)


def run(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train an arm on every fold, and test each model on what it did not see: outcomes by picture,
    those of all folds together, and what guessing would score.
    """
    out = folder.parent
    outcomes: dict[str, list[Tensor]] = {}
    chances: dict[str, list[float]] = {}
    for fold in part["folds"]:
        finished = train(settings_of(part, out, fold, folder / str(fold)))
        encoder = models.load(str(finished), torch.device("cpu"), None)
        for name, task, data in tests_of(part, out, fold):
            (record,), items = evaluate(
                encoder,
                plugin.keyed("vlp.eval.tasks", {task: {"data": str(data)}}),
                Context(workers=0),
            )
            for of_set, score in photo_tables.SCORES.values():
                if of_set == name:
                    key = f"{name}/{score}"
                    outcomes.setdefault(key, []).append(items[f"{record['label']}/{score}"])
                    chances.setdefault(key, []).append(record["chance"][score])
        # A checkpoint holds both published towers.
        shutil.rmtree(finished)

    pooled = {key: torch.cat(of_folds).contiguous() for key, of_folds in outcomes.items()}
    save_file(pooled, folder / "items.safetensors")
    return {"chance": {key: statistics.mean(values) for key, values in chances.items()}}


def tests_of(part: dict[str, Any], out: Path, fold: int) -> Iterator[tuple[str, str, Path]]:
    """The sets that a fold's model is tested on: name, task, data."""
    folder = out / "photos" / str(fold)
    yield "retrieval", "retrieval", folder / "test"
    yield "negatives", "negatives", folder / "test"
    for name, task in (("choices", "choices"), ("numbers", "negatives")):
        if (folder / name).exists():
            yield name, task, folder / name

    # What is no photo of these folds is seen by one model of a seed.
    if fold != part["folds"][0]:
        return
    if (out / "nlvr").exists():
        yield "nlvr", "negatives", out / "nlvr"
    zeroshot = Path(part["zeroshot"] or out / "zeroshot")
    if zeroshot.exists():
        yield "zeroshot", "zeroshot", zeroshot


if __name__ == "__main__":
    main()
