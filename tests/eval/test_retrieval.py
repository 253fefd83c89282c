"""Retrieval: known answers, every annotation format, and inputs that must be refused."""

import itertools
import json

import pytest
import torch

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError
from vlp.eval.tasks import retrieval

CAPTIONS = [[f"picture {i} says {k}" for k in range(2 + i % 2)] for i in range(12)]


def evaluate(encoder, **options):
    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": options})
    records, items = evaluation.evaluate(
        encoder, tasks, Context(batch=5, workers=2, contents=Contents())
    )
    return records[0], items


def perfect():
    return material.known_encoder(
        lambda n: material.direction(n), lambda t: material.direction(int(t.split()[1]))
    )


@pytest.fixture()
def shards(tmp_path):
    samples = [(material.png(material.picture(i)), texts) for i, texts in enumerate(CAPTIONS)]
    return material.clip_benchmark_set(tmp_path / "set", samples, kind="retrieval")


def test_a_perfect_encoder_scores_one(shards):
    record, _ = evaluate(perfect(), data=str(shards))
    assert record["counts"] == {"images": 12, "captions": 30, "skipped": 0}
    for name, value in record["metrics"].items():
        assert value == 1, name
    assert {
        f"{way}_retrieval_recall@{k}" for way in ("image", "text") for k in (1, 5, 10)
    } <= record["metrics"].keys()


def test_a_constant_encoder_finds_nothing(shards):
    record, _ = evaluate(material.constant(), data=str(shards))
    assert all(value == 0 for name, value in record["metrics"].items() if "recall" in name)
    assert record["metrics"]["image_retrieval_mean_rank"] == 12
    # Between 28 and 29, with 2 or 3 own captions.
    assert record["metrics"]["text_retrieval_median_rank"] == 30 - 2.5 + 1


def test_chance_is_what_random_embeddings_reach(tmp_path):
    captions = [[f"{i} {k}" for k in range(1 + i % 4)] for i in range(60)]
    samples = [(material.png(material.picture(i)), texts) for i, texts in enumerate(captions)]
    root = material.clip_benchmark_set(tmp_path, samples, kind="retrieval")
    sums: dict[str, float] = {}
    for seed in range(20):
        record, _ = evaluate(material.random_encoder(seed), data=str(root))
        for name in record["chance"]:
            sums[name] = sums.get(name, 0) + record["metrics"][name] / 20
    for name, chance in record["chance"].items():
        assert sums[name] == pytest.approx(chance, abs=4 * (chance / (20 * 60)) ** 0.5), name
    for own, total, k in ((1, 7, 1), (2, 7, 3), (5, 6, 2), (3, 5, 10)):
        hands = list(itertools.combinations(range(total), min(k, total)))
        share = sum(any(card < own for card in hand) for hand in hands) / len(hands)
        assert retrieval._chance_any(torch.tensor([own]), total, k) == pytest.approx(share)


def test_an_image_is_found_if_any_of_its_captions_is(shards):
    """One good caption an image: text retrieval is perfect, image retrieval for the good ones."""
    good = material.known_encoder(
        lambda n: material.direction(n),
        lambda t: (
            material.direction(int(t.split()[1]))
            if t.endswith("0")
            else material.direction("wrong", t)
        ),
    )
    record, items = evaluate(good, data=str(shards))
    assert record["metrics"]["text_retrieval_recall@1"] == 1
    assert record["metrics"]["image_retrieval_recall@1"] < 0.6
    assert items["retrieval/image_retrieval_recall@1"][:, 1].tolist() == [len(c) for c in CAPTIONS]


def test_a_folder_of_images_with_text_files_is_read(tmp_path):
    for i, texts in enumerate(CAPTIONS):
        (tmp_path / f"{i:02d}.png").write_bytes(material.png(material.picture(i)))
        (tmp_path / f"{i:02d}.txt").write_text("\n".join(texts) + "\n")
    record, _ = evaluate(perfect(), data=str(tmp_path), lines="each")
    assert record["counts"]["captions"] == 30
    assert record["metrics"]["text_retrieval_recall@1"] == 1
    # As training reads it: a file is one caption.
    record, _ = evaluate(perfect(), data=str(tmp_path))
    assert record["counts"]["captions"] == 12


def test_only_the_first_captions_may_be_taken(shards):
    record, _ = evaluate(perfect(), data=str(shards), captions_per_image=1)
    assert record["counts"]["captions"] == 12


# --- annotation formats, built from the real photos and captions ----------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve open COCO photos as files, and their rows."""
    rows = material.read_jsonl(material.shared("coco_open.jsonl"))[:12]
    root = tmp_path_factory.mktemp("photos")
    for name, data in material.members_of(
        material.shared("coco_open.tar"), [r["image"] for r in rows]
    ).items():
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / name.split("/")[-1]).write_bytes(data)
    return root, rows


def formats(rows):
    """(file name, content) of each published format."""
    name = {r["image"]: r["image"].split("/")[-1] for r in rows}
    karpathy = [
        {
            "filepath": "val2014",
            "filename": name[r["image"]],
            "split": "test" if i < 10 else "restval",
            "sentences": [{"raw": c} for c in r["captions"]],
        }
        for i, r in enumerate(rows)
    ]
    flickr = [{k: v for k, v in row.items() if k != "filepath"} for row in karpathy]
    coco = {
        "images": [{"id": r["coco_id"], "file_name": name[r["image"]]} for r in rows[:10]],
        "annotations": [
            {"id": 1, "image_id": r["coco_id"], "caption": c}
            for r in rows[:10]
            for c in r["captions"]
        ],
    }
    blip = [{"image": r["image"], "caption": r["captions"]} for r in rows[:10]]
    lines = [
        "image,caption",
        *(f"{name[r['image']]},{c}" for r in rows[:10] for c in r["captions"]),
    ]
    return {
        "dataset_coco.json": json.dumps({"images": karpathy, "dataset": "coco"}),
        "dataset_flickr30k.json": json.dumps({"images": flickr, "dataset": "flickr30k"}),
        "captions_val2014.json": json.dumps(coco),
        "coco_karpathy_test.json": json.dumps(blip),
        "flickr30k_test_karpathy.txt": "\n".join(lines),
    }


def test_every_published_caption_file_is_read_alike(photos, tmp_path):
    root, rows = photos
    scores = []
    for file, content in formats(rows).items():
        (tmp_path / file).write_text(content)
        task = plugin.keyed(
            "vlp.eval.tasks",
            {"retrieval": {"data": str(tmp_path / file), "images": str(root / "images")}},
        )
        source = evaluation.read_all(task)[0]
        assert [r.captions for r in source.records] == [
            tuple(c.strip() for c in r["captions"]) for r in rows[:10]
        ], file
        assert [r.picture.path.split("/")[-1] for r in source.records] == [
            r["image"].split("/")[-1] for r in rows[:10]
        ], file
        scores.append(
            evaluate(
                material.random_encoder(), data=str(tmp_path / file), images=str(root / "images")
            )[0]["metrics"]
        )
    assert all(s == scores[0] for s in scores)


def test_the_open_coco_photos_are_read_from_their_table():
    rows = material.read_jsonl(material.shared("coco_open.jsonl"))
    record, _ = evaluate(material.random_encoder(), data=str(material.shared("coco_open.jsonl")))
    assert record["counts"] == {
        "images": 111,
        "captions": sum(len(r["captions"]) for r in rows),
        "skipped": 0,
    }


# --- what must be refused -------------------------------------------------------------------------


def test_wrong_splits_missing_images_and_silent_images_are_named(photos, tmp_path):
    root, rows = photos
    files = formats(rows)
    where = {"images": str(root / "images")}

    def attempt(file, content, **options):
        (tmp_path / file).write_text(content)
        return evaluate(material.random_encoder(), data=str(tmp_path / file), **where, **options)

    with pytest.raises(
        DataError, match=r"no row with split = 'val'; split holds test \(10\), restval \(2\)"
    ):
        attempt("dataset_coco.json", files["dataset_coco.json"], split="val")
    changed = json.loads(files["captions_val2014.json"])
    changed["annotations"] = changed["annotations"][5:]
    with pytest.raises(
        DataError, match=r"1 of 10 images have no caption, e\.g\. .*000000000285\.jpg.*missing=skip"
    ):
        attempt("captions.json", json.dumps(changed))
    assert (
        attempt("captions.json", json.dumps(changed), missing="skip")[0]["counts"]["skipped"] == 1
    )
    changed = json.loads(files["captions_val2014.json"])
    changed["images"] = changed["images"][1:]
    with pytest.raises(DataError, match="names image 285, which the file's images do not list"):
        attempt("captions.json", json.dumps(changed))
    lost = files["captions_val2014.json"].replace("000000000285.jpg", "000000999999.jpg")
    with pytest.raises(
        DataError, match=r"1 of 10 annotations name images that are not in .*\n  000000999999\.jpg"
    ):
        attempt("captions.json", lost)
    assert attempt("captions.json", lost, missing="skip")[0]["counts"]["skipped"] == 1
    with pytest.raises(DataError, match=r"without annotations .*captions_\*\.json"):
        attempt("captions.json", json.dumps({"images": [{"id": 1}]}))
    with pytest.raises(
        DataError, match=r"instances form .* holds no captions; give captions_\*\.json"
    ):
        boxes = [{"image_id": 1, "bbox": [0, 0, 1, 1], "category_id": 3}]
        attempt(
            "instances.json",
            json.dumps({"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": boxes}),
        )
    with pytest.raises(DataError, match="not valid JSON"):
        attempt("captions.json", "{")
    with pytest.raises(
        DataError,
        match=r"captions\.txt:2: found 1 field, expected 2 separated by commas \(image, caption\)",
    ):
        attempt("captions.txt", "image,caption\nno separator here")


def test_a_sample_without_a_caption_is_refused(tmp_path):
    samples = [(material.png(material.picture(i)), ["a", "b"] if i else []) for i in range(3)]
    root = material.clip_benchmark_set(tmp_path, samples, kind="retrieval", n_shards=1)
    with pytest.raises(DataError, match=r"1 of 3 images have no caption, e\.g\. .*s0000000\.png"):
        evaluate(perfect(), data=str(root))
