"""The data of the evidence: generated scenes, and what is derived from them for single arms.

A folder that exists is taken as it is; it is made under a temporary name, so that it exists only
whole.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from vlp.data.format import ShardWriter
from vlp.data_tools.scenes.words import SHAPES

VERSION = 2  # raised whenever `make` makes other samples
DUPLICATED = 0.3  # share of the samples whose caption many others have, too


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

    # Of the data above alone, so that more arms do not make them anew.
    if not (folder / "duplicates").exists():
        train = folder / "scenes" / "train"
        whole(folder / "duplicates", lambda part: plant_duplicates(train, part))


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
