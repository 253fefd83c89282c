"""MMVP-VLM, Cola, What'sUp and CREPE in their published layouts, tiny."""

import csv
import json
import re

import pytest

from tests.eval import material
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents, DataError


def evaluate(task, encoder, **options):
    chosen = plugin.keyed("vlp.eval.tasks", {task: options})
    return evaluation.evaluate(encoder, chosen, Context(workers=0, contents=Contents()))[0][0]


def knows() -> material.Encoder:
    """Picture n is near every text that ends in n, but for "blind" ones."""

    def of_text(text: str):
        word = text.split()[-1]
        return material.direction(int(word) if word.isdecimal() else word)

    return material.known_encoder(lambda n: material.direction(n), of_text)


def put(path, number, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(material.png(material.picture(number, size)))


def mmvp(folder):
    lines = [("Question ID", "Type", "Statement")]
    for i in range(1, 9):
        kind = "Orientation and Direction" if i < 5 else "Texts"
        put(folder / "MLLM_VLM Images" / kind / f"{i}.jpg", i)
        # The last pair's second statement is the first one's.
        lines.append((i, kind, f"number {7 if i == 8 else i}"))
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    return {"data": str(folder)}


def cola(folder):
    rows = []
    for i in range(0, 6, 2):
        put(folder / "vg" / f"{i}.jpg", i)
        put(folder / "vg" / f"{i + 1}.jpg", i + 1)
        said = i if i == 4 else i + 1
        rows.append(
            [f"https://x.edu/vg/{i}.jpg", f"a {i}", f"https://x.edu/vg/{i + 1}.jpg", f"a {said}"]
        )
    (folder / "cola.json").write_text(json.dumps(rows))
    return {"data": str(folder / "cola.json"), "images": str(folder / "vg")}


def whatsup(folder):
    put(folder / "controlled_images" / "mug_on_table.jpeg", 1)
    options = ["a 1", "a 2", "a 3", "a 4"]
    item = {"image_path": "data/controlled_images/mug_on_table.jpeg", "caption_options": options}
    (folder / "controlled_images_dataset.json").write_text(json.dumps([item]))
    put(folder / "val2017" / "000000000042.jpg", 5)
    pair = [[42, "a 6", "a 5"]]
    (folder / "coco_qa_one_obj.json").write_text(json.dumps(pair))
    return {"data": str(folder)}


def crepe(folder):
    box = {"x": 2, "y": 2, "width": 4, "height": 4}
    for kind, negatives in (("swap", "['a 2', 'a 3']"), ("atom", "['a 1']")):
        path = folder / kind / f"prod_vg_hard_negs_{kind}_complexity_4.csv"
        path.parent.mkdir()
        row = {"image_id": 7, "caption": "a 1", "hard_negs": negatives, **box}
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            # One file has more regions than the other.
            writer.writerows([row] * (3 if kind == "swap" else 1))
    put(folder / "VG_100K" / "7.jpg", 1)
    return {"data": str(folder)}


CASES = [
    (mmvp, {"image_acc": 3 / 4, "Texts": 1 / 2, "mean": 3 / 4}, {"image_acc": 1 / 4}),
    (cola, {"image_acc": 2 / 3}, {"image_acc": 1 / 4}),
    (whatsup, {"coco_qa_one_obj": 0, "mean": 1 / 2}, {"mean": 3 / 8}),
    (
        crepe,
        {"prod_vg_hard_negs_swap_complexity_4": 1, "mean": 1 / 2},
        {"mean": (1 / 3 + 1 / 2) / 2},
    ),
]


@pytest.mark.parametrize(("write", "scores", "chance"), CASES)
def test_published_files_are_scored_as_their_authors_do(tmp_path, write, scores, chance):
    options = write(tmp_path)
    record = evaluate(write.__name__, knows(), **options)
    assert {name: record["metrics"][name] for name in scores} == pytest.approx(scores)
    assert {name: record["chance"][name] for name in chance} == pytest.approx(chance)
    assert set(record["metrics"]) == set(record["chance"])

    constant = evaluate(write.__name__, material.constant(), **options)
    assert set(constant["metrics"].values()) == {0}
    (pictures,) = [list(tmp_path.rglob("*.jp*g"))]
    pictures[0].unlink()
    with pytest.raises(DataError, match=r"name images that are not in|no images at|holds no image"):
        evaluate(write.__name__, knows(), **options)


def test_files_of_one_name_are_groups_of_their_own(tmp_path):
    options = crepe(tmp_path)
    swap, atom = tmp_path / "swap", tmp_path / "atom"
    (swap / "prod_vg_hard_negs_swap_complexity_4.csv").rename(swap / "x_hard_negs_y.csv")
    (atom / "prod_vg_hard_negs_atom_complexity_4.csv").rename(atom / "x_hard_negs_y.csv")
    record = evaluate("crepe", knows(), **options)
    names = {"swap/x_hard_negs_y:hard_negs": 1, "atom/x_hard_negs_y:hard_negs": 0, "mean": 1 / 2}
    assert record["metrics"] == pytest.approx(names)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def bad_files(folder):
    """(task, options, message) of sets with one thing that cannot be, in files of their own."""
    put(folder / "im" / "0.png", 0)
    images = str(folder / "im")
    aro_row = {"image_path": "0.png", "true_caption": "a", "false_caption": "b"}
    aro_row |= {"relation_name": "on", "bbox_x": 1, "bbox_y": 1, "bbox_w": 4, "bbox_h": 4}
    for number, text in enumerate((None, 5, ["x"])):
        place = folder / f"text {number}"
        row = {"image_0": "0.png", "image_1": "0.png", "caption_0": text, "caption_1": "b"}
        write_json(place / "examples.jsonl", row)
        yield "winoground", {"data": str(place), "images": images}, "expected texts to choose among"
        options = [{"image_path": "0.png", "caption_options": [text, "b"]}]
        write_json(place / "controlled_images_dataset.json", options)
        yield "whatsup", {"data": str(place), "images": images}, "expected texts to choose among"
        rows = [aro_row | {"true_caption": text}]
        write_json(place / "visual_genome_relation.json", rows)
        yield "aro", {"data": str(place), "images": images}, "expected texts to choose among"
    for number, text in enumerate((None, ["x"])):
        write_json(folder / f"{number}.jsonl", {"image": "0.png", "texts": [text, "b"]})
        data = {"data": str(folder / f"{number}.jsonl"), "images": images}
        yield "choices", data, "expected texts (a list)"

    changed = {
        "box": ({"bbox_w": 0}, "the last two above 0"),
        "word": ({"bbox_h": "x"}, "the box 1, 1, 4, x"),
        "group": ({"relation_name": 5}, "found 5, expected a relation's name"),
    }
    for name, (change, message) in changed.items():
        write_json(folder / name / "visual_genome_relation.json", [aro_row | change])
        yield "aro", {"data": str(folder / name), "images": images}, message
    for number, value in enumerate(([], {}, "x", None)):
        place = folder / f"empty {number}"
        write_json(place / "cola.json", value)
        message = "holds no items" if value in ([], {}) else "expected a list of items"
        yield "cola", {"data": str(place / "cola.json"), "images": images}, message
        write_json(place / "vg_qa_one_obj.json", value)
        yield "whatsup", {"data": str(place), "images": images}, message
        for subset in ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
            write_json(place / f"{subset}.json", value)
        yield "sugarcrepe_pp", {"data": str(place), "images": images}, message


def test_what_cannot_be_scored_is_named_before_a_model_is_loaded(tmp_path):
    cases = list(bad_files(tmp_path))
    for task, options, message in cases:
        with pytest.raises(DataError, match=re.escape(message)):
            evaluation.read_all(plugin.keyed("vlp.eval.tasks", {task: options}))
    assert len(cases) == 26
