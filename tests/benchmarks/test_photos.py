"""Photos are split by picture, every one is tested by a model that did not see it, and the tables
compare arms over the same pictures.
"""

import argparse
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks import photo_data, photo_tables, photos
from tests.data.material import encoded, picture
from vlp import config
from vlp.data.format import ShardWriter

TINY = """
out: to be given
data:
  sources: [{name: shards, path: to be given}]
  workers: 0
model:
  image_tower: {name: vit, image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}
  text_tower: {name: transformer, context_length: 16, width: 32, layers: 1, heads: 2}
  embed_dim: 16
train: {duration: 2, batch: 8, precision: float32}
objective: {infonce: {}}
"""
N, COPIES = 30, 5
GIVEN = {"photo/3.png": [("two dogs run", "two cats run"), ("two dogs run", "two dogs sit")]}


@pytest.fixture
def shards(tmp_path):
    """N photos with negatives, half of which count, and copies of the first at the end."""
    with ShardWriter(tmp_path / "shards", samples_per_shard=20) as writer:
        for i in range(N + COPIES):
            captions = [f"photo {i} of three dogs" if i % 2 else f"a photo of a dog, {i}", "a dog"]
            meta = {"image": f"photo/{i}.png", "negatives": [f"a cat, {i}"], "negatives_of": [0]}
            writer.add(None, encoded(picture(i % N)), "png", captions, meta)
    return tmp_path / "shards"


@pytest.fixture
def folds(shards, tmp_path):
    """Both folds of two, and what of each is tested."""
    counts = [photo_data.write_fold(shards, GIVEN, tmp_path / "photos", k, 2) for k in (0, 1)]
    return tmp_path, sum(counts, Counter())


def read(folder):
    return list(photo_data.contents(folder))


def test_every_picture_is_tested_once_and_never_trained_on_in_its_fold(folds):
    out, counts = folds
    tested = []
    for fold in ("0", "1"):
        test = {sample.image for sample in read(out / "photos" / fold / "test")}
        train = {sample.image for sample in read(out / "photos" / fold / "train")}
        # The copies of photos stand on the same side as they.
        assert len(test) + len(train) == N and not test & train
        tested += test
    assert len(tested) == len(set(tested)) == N
    assert counts["test_photos"] == N + COPIES
    assert counts["test_captions"] == 2 * (N + COPIES)


def test_numbers_and_given_choices_are_tested_beside_their_own_picture(folds):
    out, counts = folds
    assert (counts["number_photos"], counts["number_captions"], counts["choices"]) == (17, 17, 2)
    numbers = [sample for fold in "01" for sample in read(out / "photos" / fold / "numbers")]
    assert len(numbers) == 17
    for sample in numbers:
        (right, _), wrong = sample.captions, sample.meta["negatives"]
        assert len(wrong) == 8 and right not in wrong
        assert {text.replace(text.split()[-2], "three") for text in wrong} == {right}

    choices = [s for k in "01" for s in read_if_any(out / "photos" / k / "choices")]
    assert [tuple(sample.meta["texts"]) for sample in choices] == GIVEN["photo/3.png"]


def read_if_any(folder):
    return read(folder) if folder.exists() else []


def test_an_arm_is_trained_on_every_fold_and_pooled(folds, tmp_path):
    out, counts = folds
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    made = {"folds": [0, 1], "parts": 2, "bytes": 1, "counts": {"photos": N + COPIES, **counts}}
    args = argparse.Namespace(recipe=str(recipe), overrides=["log.every=1"], zeroshot=None)
    args.json, args.publish = str(tmp_path / "table.json"), False

    runs, titles = {}, {}
    for arm in ("infonce", "counting"):
        runs[f"{arm}_0"] = part = photos.part_of(arm, 0, made, args)
        titles[arm] = arm
        record = photos.run(part, out / f"{arm}_0")
        record |= {"settings": part, "commit": "abc", "cpu_s": 1.0}
        (out / f"{arm}_0.json").write_text(json.dumps(record))

    items = load_file(out / "counting_0" / "items.safetensors")
    # A photo and its copy are one picture for retrieval, and their equal captions one.
    assert len(items["retrieval/text_retrieval_recall@1"]) == N
    n_captions = int(items["retrieval/image_retrieval_recall@1"][:, 1].sum())
    assert n_captions == counts["test_captions"] - COPIES
    assert len(items["numbers/acc"]) == 17
    assert torch.isfinite(torch.cat(list(items.values()))).all()

    photo_tables.show(out, runs, titles, made, args)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    blind = "the commonest number, always"
    assert [row["arm"] for row in rows] == ["chance", blind, "infonce", "counting"]
    assert rows[0]["numbers, %"] == "11.1"
    # All captions that count say three.
    assert rows[1]["text R@1, %"] is None and rows[1]["numbers, %"] == "100.0"
    assert "zero-shot, %" not in rows[0]


def test_a_set_that_some_runs_were_not_tested_on_leaves_their_cells_empty(tmp_path):
    runs = {}
    further = {"infonce": "retrieval/text_retrieval_recall@1", "counting": "zeroshot/acc1"}
    for arm, key in further.items():
        keys = ["negatives/acc", key]
        runs[f"{arm}_0"] = settings = {"arm": arm, "seed": 0}
        (tmp_path / f"{arm}_0").mkdir()
        outcomes = {key: torch.tensor([[1.0, 1.0], [0.0, 1.0]]) for key in keys}
        save_file(outcomes, tmp_path / f"{arm}_0" / "items.safetensors")
        record = {"settings": settings, "chance": dict.fromkeys(keys, 0.25)}
        record |= {"commit": "abc", "cpu_s": 1.0}
        (tmp_path / f"{arm}_0.json").write_text(json.dumps(record))

    counts = {"photos": 9, "test_photos": 9, "test_captions": 9}
    args = argparse.Namespace(json=str(tmp_path / "table.json"), publish=False)
    titles = {"infonce": "InfoNCE", "counting": "Counting"}
    photo_tables.show(tmp_path, runs, titles, {"counts": counts, "folds": [0]}, args)
    chance, first, second = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert chance["zero-shot, %"] == "25.0" and chance["text R@1, %"] == "25.0"
    assert first["zero-shot, %"] is None and second["text R@1, %"] is None
    assert first["rule negatives, %"] == second["rule negatives, %"]


def test_arms_differ_in_objective_and_what_it_needs_alone():
    base = config.load(photos.RECIPE)
    for arm in photos.ARMS:
        chosen = config.load(photos.RECIPE, photos.overrides_of(arm, []))
        assert chosen.train == base.train
        assert chosen.model.image_tower == base.model.image_tower
        assert (chosen.data == base.data) == (arm != "captions")
        assert (chosen.model == base.model) == (arm != "siglip")
    assert len(photos.ARMS) == 6


def test_what_is_mistyped_is_said_before_anything_is_made(tmp_path):
    args = argparse.Namespace(recipe=str(photos.RECIPE), overrides=[], arms=["infonce"])
    args.photos, args.zeroshot = str(tmp_path / "absent"), None
    with pytest.raises(ValueError, match="name shards by --photos or VLP_PHOTOS"):
        photos.prepare(tmp_path / "out", args)

    args.overrides = ["train.bath=8"]
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        photos.prepare(tmp_path / "out", args)

    args.overrides, args.zeroshot = [], str(tmp_path / "classes")
    with pytest.raises(ValueError, match="no classes at"):
        photos.prepare(tmp_path / "out", args)

    with pytest.raises(ValueError, match="holds no folds yet"):
        photo_data.about(tmp_path / "out")


def test_a_moved_project_goes_on_with_its_runs(tmp_path):
    args = argparse.Namespace(recipe=str(photos.RECIPE), overrides=[], zeroshot=None)
    made = {"folds": [0], "bytes": 1}
    part = photos.part_of("infonce", 0, made, args)
    assert str(photos.RECIPE.parent) not in json.dumps(part)

    chosen = photos.settings_of(part, tmp_path, 0, tmp_path / "run")
    assert chosen.model.image_tower.to_config()["precomputed"]
