"""Zero-shot classification: known answers, layouts, ImageNet's relatives, and inputs that must be
refused.
"""

import fnmatch
import json
import re

import numpy as np
import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation, imagenet, prompts
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError, Picture

CLASSES = ["cat", "dog", "bird", "fish", "ant", "bee"]
LABELS = [0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5]


def evaluate(encoder, **options):
    tasks = plugin.keyed("vlp.eval.tasks", {"zeroshot": options})
    records, items = evaluation.evaluate(
        encoder, tasks, Context(batch=5, workers=2, contents=Contents())
    )
    return records[0], items


def perfect(classes=CLASSES, labels=LABELS):
    return material.known_encoder(
        lambda n: material.direction(classes[labels[n]]),
        lambda t: material.direction(
            next(c for c in classes if re.search(rf"\b{re.escape(c)}\b", t))
        ),
    )


@pytest.fixture()
def shards(tmp_path):
    samples = [(material.png(material.picture(i)), label) for i, label in enumerate(LABELS)]
    return material.clip_benchmark_set(
        tmp_path / "set", samples, classes=CLASSES, templates=["a photo of a {c}.", "one {c}"]
    )


def test_a_perfect_encoder_scores_one(shards):
    record, _ = evaluate(perfect(), data=str(shards))
    assert record["metrics"] == {"acc1": 1, "acc5": 1, "mean_per_class_recall": 1}
    assert record["counts"] == {"images": 12, "classes": 6, "templates": 2, "skipped": 0}
    assert record["chance"] == {"acc1": 1 / 6, "acc5": 5 / 6, "mean_per_class_recall": 1 / 6}


def test_a_constant_encoder_always_answers_the_first_class(shards):
    record, _ = evaluate(material.constant(), data=str(shards))
    assert record["metrics"] == pytest.approx(
        {"acc1": 4 / 12, "acc5": 10 / 12, "mean_per_class_recall": 1 / 6}
    )


def test_an_encoder_that_knows_one_class_is_told_apart_by_the_per_class_mean(shards):
    cat = material.direction("cat")
    always_cat = material.known_encoder(
        lambda n: cat, lambda t: material.direction(t.rstrip(".").split()[-1])
    )
    record, items = evaluate(always_cat, data=str(shards))
    assert record["metrics"]["acc1"] == pytest.approx(4 / 12)
    assert record["metrics"]["mean_per_class_recall"] == pytest.approx(1 / 6)
    assert items["zeroshot/acc1"].tolist() == [[float(y == 0), 1.0] for y in LABELS]
    low, high = record["intervals_95"]["acc1"]
    assert low < 4 / 12 < high


def test_a_random_encoder_scores_about_chance(tmp_path):
    samples = [(material.png(material.picture(i)), i % 6) for i in range(600)]
    root = material.clip_benchmark_set(tmp_path, samples, classes=CLASSES, templates=["{c}"])
    low, high = evaluate(material.random_encoder(), data=str(root))[0]["intervals_95"]["acc1"]
    # Six fixed class vectors: their bias is wider than Wilson's interval.
    assert low < 0.26 and high > 0.08


def test_class_embeddings_are_means_of_unit_rows_made_unit_again(shards):
    """Against the formula written out, with prompts whose embeddings differ."""
    encoder = material.random_encoder()
    scores = []
    for name in CLASSES:
        mean = (
            material.direction(0, "text", f"a photo of a {name}.")
            + material.direction(0, "text", f"one {name}")
        ) / 2
        scores.append(
            torch.stack([material.direction(0, "image", i) for i in range(12)]).double()
            @ (mean / mean.norm()).double()
        )
    expected = (torch.stack(scores, 1).argmax(1) == torch.tensor(LABELS)).double().mean()
    assert evaluate(encoder, data=str(shards))[0]["metrics"]["acc1"] == pytest.approx(
        float(expected)
    )


def test_the_same_pictures_in_a_tree_a_table_and_parquet_score_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [material.png(material.picture(i)) for i in range(12)]
    for i, label in enumerate(LABELS):
        folder = tmp_path / "tree" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(images[i])
    material.write_tar(
        tmp_path / "table.tar", [(f"x/{i}.png", image) for i, image in enumerate(images)]
    )
    rows = [
        {"image": f"x/{i}.png", "class": CLASSES[y], "split": "test"} for i, y in enumerate(LABELS)
    ]
    rows.append({"image": "no", "class": "x", "split": "train"})
    (tmp_path / "table.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    features = {"info": {"features": {"label": {"names": CLASSES, "_type": "ClassLabel"}}}}
    table = pa.table({"image": [{"bytes": i, "path": None} for i in images], "label": LABELS})
    (tmp_path / "hub/data").mkdir(parents=True)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}),
        tmp_path / "hub/data/test-00000-of-00001.parquet",
    )
    for data in ("tree", "table.jsonl", "hub"):
        record, _ = evaluate(perfect(), data=str(tmp_path / data))
        assert record["metrics"]["acc1"] == 1, data
        assert record["counts"]["classes"] == 6, data
    assert record["dataset"] == "hub"


def test_a_data_set_on_the_hub_is_fetched_and_read(shards, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, repo_type, allow_patterns=("*",), local_files_only=False):
        if local_files_only:  # whether an earlier download is here
            return str(shards)
        files = [str(p.relative_to(shards)) for p in shards.rglob("*") if p.is_file()]
        wanted = {
            f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in allow_patterns)
        }
        assert wanted == set(files)
        assert not any(fnmatch.fnmatch("train/0.tar", pattern) for pattern in allow_patterns)
        asked.append((name, repo_type))
        return str(shards)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    record, _ = evaluate(perfect(), data="hf:someone/wds_set")
    assert (asked, record["dataset"], record["metrics"]["acc1"]) == (
        [("someone/wds_set", "dataset")],
        "someone/wds_set",
        1,
    )


def test_several_labels_a_picture_give_mean_average_precision(tmp_path):
    hot = [np.array([i % 2 == 0, i % 3 == 0, True]).astype(np.int64) for i in range(8)]
    samples = [(material.png(material.picture(i)), labels) for i, labels in enumerate(hot)]
    root = material.clip_benchmark_set(
        tmp_path, samples, classes=CLASSES[:3], templates=["{c}"], kind="multilabel"
    )
    record, _ = evaluate(material.constant(), data=str(root))
    # all tied: the positives come last, class by class
    expected = np.mean([np.mean([(j + 1) / (8 - n + j + 1) for j in range(n)]) for n in (4, 3, 8)])
    assert record["metrics"]["mean_average_precision"] == pytest.approx(expected)
    assert record["chance"]["mean_average_precision"] == pytest.approx(15 / 24)


def test_shards_of_our_own_tool_are_read_as_their_table_is(tmp_path):
    """clip_benchmark's layout by `vlp data pack`, with numbers and names, against the JSONL that it
    was packed from.
    """
    from vlp import cli

    table, tar = material.shared("caltech101.jsonl"), material.shared("caltech101.tar")
    rows = [r for r in material.read_jsonl(table) if r["split"] == "test"][::40]
    material.write_tar(
        tmp_path / "t.tar", list(material.members_of(tar, [r["image"] for r in rows]).items())
    )
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack = [
        "data",
        "pack",
        tmp_path / "t.tar",
        "--captions",
        tmp_path / "t.jsonl",
        "--layout",
        "clip_benchmark",
    ]
    assert (
        cli.main(
            [*map(str, pack), "--template", "a photo of a {}.", "--to", str(tmp_path / "packed")]
        )
        == 0
    )
    encoder = material.matrix_encoder()
    packed, _ = evaluate(encoder, data=str(tmp_path / "packed"))
    direct, _ = evaluate(encoder, data=str(tmp_path / "t.jsonl"), templates="photo")
    assert packed["counts"] == direct["counts"] and packed["metrics"] == direct["metrics"]


def test_numbers_count_before_names_where_the_set_lists_its_classes(tmp_path):
    members = []
    for i, label in enumerate(LABELS):
        meta = {"class": CLASSES[label].upper() + " (some)"}
        members += [
            (f"{i}.png", material.png(material.picture(i))),
            (f"{i}.json", json.dumps(meta).encode()),
        ]
        members.append((f"{i}.cls", str(label).encode()))
    material.write_tar(tmp_path / "test" / "0.tar", members)
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    assert evaluate(perfect(), data=str(tmp_path))[0]["metrics"]["acc1"] == 1


# --- ImageNet and its relatives -------------------------------------------------------------------


def tree(root, folders):
    for i, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        (root / folder / "a.png").write_bytes(material.png(material.picture(i)))
    return root


def by_name(names):
    """Perfect on picture n of class names[n], under the one template of `photo`."""
    said = len("a photo of a ")
    return material.known_encoder(
        lambda n: material.direction(names[n]), lambda t: material.direction(t[said:-1])
    )


def test_an_imagenet_tree_takes_names_and_templates_from_open_clip(tmp_path):
    folders, names = imagenet.synsets()[5:9], imagenet.names()[5:9]
    root = tree(tmp_path, folders)
    with pytest.raises(DataError, match=r"4 of ImageNet's 1000 classes.*partial=true"):
        evaluate(perfect(), data=str(root))
    record, _ = evaluate(by_name(names), data=str(root), partial=True, templates="photo")
    assert record["metrics"]["acc1"] == 1
    data = plugin.keyed("vlp.eval.tasks", {"zeroshot": {"data": str(root), "partial": True}})
    assert evaluation.read_all(data)[0].templates == prompts.templates("imagenet80")
    assert len(prompts.templates("imagenet80")) == 80


def test_a_tree_of_real_photos_under_synsets_is_scored_by_a_real_model(tmp_path):
    """Photos of Caltech 101 under ImageNet's numbers, against the 80-template classifier written
    out.
    """
    from vlp.eval import models

    known = {"airplanes": "n02690373", "leopards": "n02128385", "grand piano": "n03452741"}
    rows = [
        r for r in material.read_jsonl(material.shared("caltech101.jsonl")) if r["split"] == "test"
    ]
    chosen = [r for r in rows if r["class"].replace("_", " ") in known][::4]
    assert len({r["class"] for r in chosen}) == 3
    for name, data in material.members_of(
        material.shared("caltech101.tar"), [r["image"] for r in chosen]
    ).items():
        synset = known[next(r["class"] for r in chosen if r["image"] == name).replace("_", " ")]
        (tmp_path / "val" / synset).mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / synset / name.split("/")[-1]).write_bytes(data)
    encoder = models.load(str(material.tiny_open_clip(tmp_path / "model")))
    record, items = evaluate(encoder, data=str(tmp_path), split="val", partial=True)
    assert record["counts"] == {"images": len(chosen), "classes": 3, "templates": 80, "skipped": 0}
    rows = []
    for name in ("leopard", "airliner", "grand piano"):
        rows.append(
            encoder.encode_texts(prompts.fill(prompts.templates("imagenet80"), [name]))
            .double()
            .mean(0)
        )
    classes = torch.stack([row / row.norm() for row in rows])
    hits = []
    for number, synset in enumerate(sorted(known.values())):
        pictures = [
            Picture(p.name, str(p)).open() for p in sorted((tmp_path / "val" / synset).iterdir())
        ]
        hits += (
            (((encoder.encode_images(pictures).double() @ classes.T).argmax(1)) == number)
            .double()
            .tolist()
        )
    assert items["zeroshot/acc1"][:, 0].tolist() == hits


def test_a_tree_of_imagenet_r_is_scored_among_its_200_classes(tmp_path):
    folders = imagenet.synsets("imagenet_r")
    names = [imagenet.names()[imagenet.synsets().index(f)] for f in folders]
    record, _ = evaluate(by_name(names), data=str(tree(tmp_path, folders)), templates="photo")
    assert (record["counts"]["classes"], record["metrics"]["acc1"]) == (200, 1)


@pytest.mark.parametrize("classes", [{}, {"classes": "imagenet"}])
def test_a_tree_of_imagenet_v2_is_numbered(tmp_path, classes):
    folders = [str(i) for i in range(1000)]
    options = {"data": str(tree(tmp_path, folders)), "templates": "photo", **classes}
    record, _ = evaluate(by_name(imagenet.names()), **options)
    # "missile" and "sunglasses" name two classes each; as with argmax, the second of each cannot be
    # found
    assert (record["counts"]["classes"], record["metrics"]["acc1"]) == (1000, 0.998)


def test_objectnet_is_scored_among_its_overlapping_classes_without_the_frame(tmp_path):
    images = tmp_path / "objectnet-1.0" / "images"
    for i, folder in enumerate(["air_freshener", "alarm_clock", "backpack"]):
        (images / folder).mkdir(parents=True)
        framed = material.picture(255, (12, 12))
        framed.paste(material.picture(i), (2, 2))
        (images / folder / "x.png").write_bytes(material.png(framed))
    labels = {
        "air_freshener": "Air freshener",
        "alarm_clock": "Alarm clock",
        "backpack": "Backpack",
    }
    (tmp_path / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    overlap = {"Alarm clock": "analog clock", "Backpack": "backpack, back pack"}
    (tmp_path / "objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))

    # The root as clip_benchmark makes it, with the mappings beside the zip's folder.
    encoder = by_name(["-", "alarm clock", "backpack"])
    record, _ = evaluate(encoder, data=str(tmp_path), templates="photo")
    assert record["metrics"]["acc1"] == 1
    assert record["counts"] == {"images": 2, "classes": 2, "templates": 1, "skipped": 0}
    (usual,) = evaluation.read_all(
        plugin.keyed("vlp.eval.tasks", {"zeroshot": {"data": str(tmp_path)}})
    )
    assert len(usual.templates) == 80

    # As the zip unpacks, the mappings lie beside the images.
    mappings = tmp_path / "objectnet-1.0" / "mappings"
    mappings.mkdir()
    for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"):
        (tmp_path / name).rename(mappings / name)
    for root in (tmp_path, tmp_path / "objectnet-1.0", images):
        again, _ = evaluate(encoder, data=str(root), templates="photo")
        assert again["metrics"] == record["metrics"] and again["counts"] == record["counts"]


# --- what must be refused -------------------------------------------------------------------------


def test_class_lists_of_the_wrong_length_are_refused(shards, tmp_path):
    with pytest.raises(DataError, match=r"lists 2 names but .* has 6 classes"):
        evaluate(perfect(), data=str(shards), classes=["cat", "dog"])
    (shards / "classnames.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match="class number 5 but only 2 class names"):
        evaluate(perfect(), data=str(shards))
    (shards / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"no classnames.txt"):
        evaluate(perfect(), data=str(shards))
    with pytest.raises(
        DataError, match=r"lists 3 names but .* has 2 classes, 1 of them unknown by name: 'zebra'"
    ):
        evaluate(
            perfect(),
            data=str(tree(tmp_path / "t", ["cat", "zebra"])),
            classes=["cat", "dog", "ant"],
        )


def test_names_may_be_given_for_folders(tmp_path):
    root = tree(tmp_path, ["k1", "k2"])
    record, _ = evaluate(perfect(["cat", "dog"], [0, 1]), data=str(root), classes=["cat", "dog"])
    assert record["metrics"]["acc1"] == 1


def test_missing_shards_images_and_splits_are_named(shards, tmp_path):
    (shards / "test" / "1.tar").unlink()
    with pytest.raises(DataError, match=r"announces 2 shards but 1 are not there.*1\.tar"):
        evaluate(perfect(), data=str(shards))
    with pytest.raises(DataError, match="no evaluation data at"):
        evaluate(perfect(), data=str(tmp_path / "nowhere"))
    material.write_tar(tmp_path / "t.tar", [("0.png", material.png(material.picture(0)))])
    rows = [{"image": f"{i}.png", "class": CLASSES[i], "split": "test"} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = (
        r"2 of 3 annotations name images that are not in .*\n  1\.png is missing.*\n"
        r"  2\.png is missing.*\n.*missing=skip"
    )
    with pytest.raises(DataError, match=said):
        evaluate(perfect(), data=str(tmp_path / "t.jsonl"))
    record, _ = evaluate(perfect(), data=str(tmp_path / "t.jsonl"), missing="skip")
    assert record["counts"]["skipped"] == 2
    with pytest.raises(DataError, match=r"no row with split = 'val'; split holds test \(3\)"):
        evaluate(perfect(), data=str(tmp_path / "t.jsonl"), split="val")


def test_splits_are_not_taken_for_classes(tmp_path):
    tree(tmp_path / "train", ["cat"])
    tree(tmp_path / "val", ["cat"])
    with pytest.raises(DataError, match="no split 'test', only train, val"):
        evaluate(perfect(), data=str(tmp_path))


def test_a_picture_that_does_not_open_is_named(tmp_path):
    root = tree(tmp_path, ["cat", "dog"])
    (root / "dog" / "a.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError, match=r"dog/a\.png does not open"):
        evaluate(perfect(), data=str(root))


def test_templates_without_a_place_for_the_name_are_refused(shards):
    with pytest.raises(DataError, match="exactly one"):
        evaluate(perfect(), data=str(shards), templates=["a photo"])
    with pytest.raises(DataError, match=r"known sets: .*imagenet80"):
        evaluate(perfect(), data=str(shards), templates="imagenet81")
    for name in prompts.sets():
        assert prompts.templates(name)
