"""The data of the evidence: generated scenes, and what is derived from them for single arms.

A folder that exists is taken as it is; it is made under a temporary name, so that it exists only
whole.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks import report
from vlp.data.format import ShardWriter
from vlp.data_tools.scenes.words import HELDOUT_COUNTS, NUMBERS, SHAPES

VERSION = 2  # raised whenever `make` makes other samples
BALANCE = "equal"  # of the numbers that counting pairs state
N_PROOFS = 2700  # items of each kind; a third of counting's show a combination that is held out
SINGULAR = {plural: shape for shape, plural in SHAPES.items()}
_NUMBER = rf"\b({'|'.join(NUMBERS[2:])}|\d+) "
NUMBER_BEFORE = re.compile(_NUMBER)
COUNTED_SHAPE = re.compile(rf"{_NUMBER}(?:\w+ )*?({'|'.join(SINGULAR)})\b")
MISPLACED = 0.4  # share of the samples whose captions are another's
DUPLICATED = 0.3  # share of the samples whose caption many others have, too
FIRST_SHARDS = "{00000..00003}.tar"  # of the arms that are trained on 4,000 scenes
N_FIRST_SHARDS = 4
PATCH = 8  # side of the squares of a picture of edges that are a row each


def make(folder: Path) -> None:
    """Scenes, their negatives and counting pairs, where they are not there yet."""
    version = folder / "version"
    if folder.exists():
        if not version.exists() or version.read_text() != str(VERSION):
            raise ValueError(
                f"{folder} was made by other tools than these; remove it or choose another --out"
            )
    else:
        whole(folder, make_scenes)

    # Each of the data above alone, so that more arms do not make them anew.
    train = folder / "scenes" / "train"
    derived: dict[str, Callable[[Path], None]] = {
        "duplicates": lambda part: plant_duplicates(train, part),
        "noisy": lambda part: misplace_captions(train, part),
        "numberless": lambda part: without_numbers(train, part),
        "counted": lambda part: count(train, part),
        "proofs_of_counting": prove_counting,
        "edged": lambda part: draw_edges(folder / "scenes", part),
    }
    for name, fill in derived.items():
        if not (folder / name).exists():
            whole(folder / name, fill)


def whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder under another name and give it its own at the end."""
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    fill(part)
    part.rename(folder)


def make_scenes(folder: Path) -> None:
    train = f"{folder}/scenes/train"
    vlp("scenes", "--to", f"{folder}/scenes", "--size", "32")

    kinds = "swap_attribute,swap_noun,replace_relation,order"
    options = ("--words", "scenes", "--kinds", kinds, "--k", "2")
    vlp("negatives", train, "--to", f"{folder}/negatives", *options)

    options = ("--counterfactuals", "1", "--balance", "equal")
    vlp("counting", train, "--to", f"{folder}/counting_pairs", *options)
    (folder / "version").write_text(str(VERSION))


def plant_duplicates(source: Path, to: Path) -> None:
    """The scenes of `source`, of which DUPLICATED have one short caption: the color and shape of
    their first group, true of many others.
    """
    rng = random.Random(0)
    with ShardWriter(to, samples_per_shard=1000) as writer:
        for sample in samples_of(source):
            record = json.loads(sample.pop("json"))
            captions = record.pop("captions")
            if rng.random() < DUPLICATED:
                first = record["scene"]["groups"][0]
                captions = [f"a picture of {first['color']} {SHAPES[first['shape']]}"]
            writer.add(record.pop("key"), sample["jpg"], "jpg", captions, record)


def misplace_captions(source: Path, to: Path) -> None:
    """The scenes of `source`, of which MISPLACED have the captions of another one of them."""
    samples = list(samples_of(source))
    records = [json.loads(sample.pop("json")) for sample in samples]
    captions = [record.pop("captions") for record in records]
    rng = random.Random(0)
    chosen = rng.sample(range(len(samples)), int(MISPLACED * len(samples)))

    # Dealt around a ring in an order by chance: nobody keeps its own.
    given = dict(zip(chosen, [*chosen[1:], chosen[0]]))
    with ShardWriter(to, samples_per_shard=1000) as writer:
        for place, (sample, record) in enumerate(zip(samples, records)):
            texts = captions[given.get(place, place)]
            writer.add(record.pop("key"), sample["jpg"], "jpg", texts, record)


def without_numbers(source: Path, to: Path) -> None:
    """The scenes of `source` with captions that tell one from several, but not how many."""
    with ShardWriter(to, samples_per_shard=1000) as writer:
        for sample in samples_of(source):
            record = json.loads(sample.pop("json"))
            captions = [NUMBER_BEFORE.sub("", text) for text in record.pop("captions")]
            writer.add(record.pop("key"), sample["jpg"], "jpg", captions, record)


def count(source: Path, to: Path) -> None:
    """Counting pairs of `source`, without counterfactuals that training never shows to be true.

    A number and shape that are always wrong in training would be learnt as wrong.
    """
    every = to / "every"
    vlp("counting", str(source), "--to", str(every), "--balance", BALANCE)

    with ShardWriter(to, samples_per_shard=1000) as writer:
        for sample in samples_of(every):
            record = json.loads(sample.pop("json"))
            captions = record.pop("captions")
            kept = [text for text in record["counterfactuals"] if is_shown(text)]
            record |= {"counterfactuals": kept, "counterfactuals_of": [0] * len(kept)}
            writer.add(record.pop("key"), sample["jpg"], "jpg", captions, record)
    shutil.rmtree(every)


def is_shown(caption: str) -> bool:
    """Whether training shows every number of a shape that a caption states."""
    stated = {
        (number_of(number), SINGULAR[shape]) for number, shape in COUNTED_SHAPE.findall(caption)
    }
    return stated.isdisjoint(HELDOUT_COUNTS)


def number_of(text: str) -> int:
    return int(text) if text.isdigit() else NUMBERS.index(text)


def prove_counting(to: Path) -> None:
    """Proofs of counting in more pictures than the scenes have; those whose number and shape
    training shows, and the others.
    """
    numbers = {"proofs": N_PROOFS, "train": 0, "val": 0, "test": 0, "zeroshot": 0, "retrieval": 0}
    options = [f"--{name}={n}" for name, n in numbers.items()]
    vlp("scenes", "--to", str(to / "every"), "--size", "32", "--seed", "1", *options)

    every = list(samples_of(to / "every" / "counting"))
    for name, is_heldout in (("seen", False), ("heldout", True)):
        with ShardWriter(to / name, samples_per_shard=1000) as writer:
            for sample in every:
                record = json.loads(sample["json"])
                if bool(record["heldout"]) == is_heldout:
                    captions = record.pop("captions")
                    writer.add(record.pop("key"), sample["jpg"], "jpg", captions, record)
    shutil.rmtree(to / "every")


def draw_edges(scenes: Path, to: Path) -> None:
    """The scenes that arms of a third modality are trained and tested on, each with a second
    picture of itself that has no color: its edges, as rows beside the shards.
    """
    sets = {"train": sorted((scenes / "train").glob("*.tar"))[:N_FIRST_SHARDS]}
    sets["retrieval/test"] = sorted((scenes / "retrieval" / "test").glob("*.tar"))
    for name, shards in sets.items():
        (to / name).mkdir(parents=True)
        for shard in shards:
            add_edges(shard, to / name / shard.name)
        rows = to / f"{name.partition('/')[0]}_edges"
        vlp("modality", str(to / name), "--vectors", "edges", "--to", str(rows))

    # Beside its shards the layout says what they are.
    for file in ("dataset_type.txt", "test/nshards.txt"):
        shutil.copy(scenes / "retrieval" / file, to / "retrieval" / file)


def add_edges(shard: Path, to: Path) -> None:
    """The samples of a shard, each with the edges of its picture as KEY.edges.npy."""
    with tarfile.open(shard) as before, tarfile.open(to, "w") as after:
        for member in before:
            file = before.extractfile(member)
            content = file.read() if file else b""
            after.addfile(member, io.BytesIO(content))
            if member.name.endswith(".jpg"):
                written = io.BytesIO()
                np.save(written, edges(content))
                named = tarfile.TarInfo(f"{Path(member.name).stem}.edges.npy")
                named.size = written.tell()
                written.seek(0)
                after.addfile(named, written)


def edges(picture: bytes) -> np.ndarray:
    """How much the lightness of a picture changes at each pixel, [squares, PATCH²] from 0 to 1."""
    light = np.asarray(Image.open(io.BytesIO(picture)).convert("L"), np.float32) / 255
    change = np.hypot(*np.gradient(light))
    down, across = (side // PATCH for side in change.shape)
    squares = change[: down * PATCH, : across * PATCH].reshape(down, PATCH, across, PATCH)
    return squares.swapaxes(1, 2).reshape(down * across, PATCH**2)


def mine(folder: Path, model: Path, shards: str) -> None:
    """The scenes of these shards with the two captions of others that `model` finds nearest to
    their pictures.
    """
    if (folder / "mined").exists():
        return
    train, embedded = f"{folder}/scenes/train/{shards}", folder / "embedded"
    if not embedded.exists():
        options = ("--model", str(model), "--to")
        whole(embedded, lambda part: vlp("embed", train, *options, str(part)))

    # Far enough down for captions that score clearly below the own one.
    options = ("--embeddings", str(embedded), "--top", "1000", "--k", "2", "--to")
    whole(folder / "mined", lambda part: vlp("mine", train, *options, str(part)))


def samples_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The members of every sample by extension, in the order of the shards."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    yield from webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)


def vlp(tool: str, *arguments: str) -> None:
    """Call one of `vlp data`'s tools."""
    subprocess.run(
        [sys.executable, "-m", "vlp.cli", "data", tool, *arguments], check=True, cwd=report.ROOT
    )
