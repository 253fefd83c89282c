"""Every shipped configuration trains: its data fields, objective, teacher, heads and views, with tiny towers and pictures."""

import json
import re
from pathlib import Path

import pytest

from tests.data.material import encoded, picture
from vlp import config
from vlp.data.format import ShardWriter
from vlp.train import train

TEXT = "{name: transformer, context_length: 16, width: 16, layers: 1, heads: 2}"
ELSEWHERE = {"demo", "caltech101", "jest", "mcl"}  # run by make demo, by the benchmark, and in tests/selection


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Samples with all that any recipe reads of its data."""
    folder = tmp_path_factory.mktemp("recipes") / "shards"
    with ShardWriter(folder, 100) as writer:
        for i in range(40):
            meta = {"negatives": [f"not {i}", f"nor {i}"], "counterfactuals": [f"{i} and two", f"{i} and three"]}
            own, other = (encoded(picture(k, (16, 16))) for k in (i, i + 50))
            writer.add(f"k{i}", own, "png", [f"this is picture {i}"], meta, negative_image=(other, "png"))
    return folder


def tiny(recipe: Path, shards: Path, out: Path, *more: str) -> config.Config:
    plain = config.load(recipe)
    locked = plain.model.image_tower.common is not None and plain.model.image_tower.common.locked
    tower = f"{{name: vit, image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 16, locked: {str(locked).lower()}}}"
    paths = [f"data.sources.{i}.path={shards}" for i in range(len(plain.data.sources))]
    queue, micro_batches = min(plain.teacher.queue, 16), min(plain.train.micro_batches, 2)
    return config.load(recipe, [
        f"out={out}", *paths, "data.workers=0", f"model.image_tower={tower}", f"model.text_tower={TEXT}", "model.embed_dim=16",
        "model.pretrained=null", "train.duration=3", "train.batch=16", f"train.micro_batches={micro_batches}",
        "train.precision=float32", f"teacher.queue={queue}", "eval={}", *more,
    ])  # fmt: skip


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


RECIPES = {path.stem: path for path in sorted(Path(config.__file__).parent.parent.glob("configs/*.yaml"))}


def test_every_recipe_has_a_header():
    """What it is, its data, its command, the hardware and the result; and the number of recipes that are run below."""
    assert RECIPES.keys() == config.shipped().keys() and len(RECIPES) == 19
    for name, path in RECIPES.items():
        header = re.match(r"(#.*\n)+", path.read_text())[0]
        assert {"command", "hardware", "result"} <= set(re.findall(r"^# +(\w+)  ", header, re.M)), name
        assert name == "demo" or re.search(r"^# data  ", header, re.M), name
        assert f"vlp train {name}" in header or f"train.py {name}" in header or name == "demo"


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - ELSEWHERE))
def test_a_recipe_trains(name, shards, tmp_path):
    more = []
    if name == "distillation":
        more = [f"teacher.model={train(tiny(RECIPES['clip'], shards, tmp_path / 'teacher'))}"]
    run = train(tiny(RECIPES[name], shards, tmp_path / "run", *more, "log.every=1"))
    records = [line for line in losses(run) if line["kind"] == "train"]
    assert [line["step"] for line in records] == [1, 2, 3]
    terms = [term.label for term in config.load(RECIPES[name]).objective]
    assert all(term in line for term in terms for line in records)
    assert len({line["loss"] for line in records}) == 3  # it moves
