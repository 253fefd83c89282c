"""Published sets of long captions by their layouts: tiny copies are read and scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.eval import material
from tests.models.tiny import tiny
from vlp import plugin
from vlp.eval import evaluation
from vlp.eval.datasets import open_source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import retrieval

N = 4


def caption(i: int) -> str:
    return f"A photo of {i} dogs. They run over a meadow, and behind them stand {i} cats."


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        (folder / name).write_bytes(material.png(material.picture(i)))


def urban1k(root: Path) -> Path:
    pictures(root / "image", *(f"{i}.jpg" for i in range(N)))
    (root / "caption").mkdir()
    for i in range(N):
        (root / "caption" / f"{i}.txt").write_text(f"{caption(i)}\n")
    return root


def docci(root: Path) -> Path:
    """Images of two splits, one table."""
    rows = []
    for split in ("train", "test"):
        names = [f"{split}_{i:05d}.jpg" for i in range(N)]
        pictures(root / "images", *names)
        for i, name in enumerate(names):
            row = {"split": split, "type": "document", "description": caption(i)}
            rows.append(row | {"image_file": name, "example_id": name[:-4]})
    (root / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, rows)))
    return root


def dci(root: Path, folder: str = "complete") -> Path:
    base = root / "densely_captioned_images"
    pictures(base / "photos", *(f"sa_{i}.jpg" for i in range(N)))
    (base / folder).mkdir()
    for i in range(N):
        short, extra = caption(i).split(". ")
        annotation = {
            "image": f"sa_{i}.jpg",
            "short_caption": f"{short}.",
            "extra_caption": extra,
            "mask_data": {"0": {"outer_mask": "iVBOR", "caption": "a mask"}},
        }
        (base / folder / f"sa_{i}.json").write_text(json.dumps(annotation))
    splits = {"train": ["sa_3.json"], "test": ["sa_0.json", "sa_1.json", "sa_2.json"]}
    (base / "splits.json").write_text(json.dumps(splits))
    return root


def sharegpt4v(root: Path) -> Path:
    """A table of dialogues; of its last image there is no file, as of most of a million."""
    pictures(root / "sam" / "images", *(f"sa_{i}.jpg" for i in range(N)))
    rows = []
    for i in range(N + 1):
        dialogue = [
            {"from": "human", "value": "Describe this picture.\n<image>"},
            {"from": "gpt", "value": caption(i).replace(". ", ".\n\n")},
        ]
        rows.append({"id": str(i), "image": f"sam/images/sa_{i}.jpg", "conversations": dialogue})
    path = root / "share-captioner_coco_lcs_sam_1246k_1107.json"
    path.write_text(json.dumps(rows))
    return path


def iiw(root: Path) -> Path:
    """IIW-400: pictures of DOCCI by their names without an ending, two descriptions a row."""
    pictures(root / "docci" / "images_aar", *(f"aar_test_{i:05d}.jpg" for i in range(N)))
    rows = []
    for i in range(N):
        row = {"image/key": f"aar_test_{i:05d}", "IIW": caption(i), "IIW-P5B": "of a machine"}
        rows.append(row | {"objects": [{"label": "dog", "description": "a dog"}]})
    path = root / "iiw" / "IIW-400" / "data.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


IIW = {"image_column": "image/key", "caption_columns": "IIW"}
LAYOUTS = [
    (iiw, IIW, N),
    (urban1k, {}, N),
    (docci, {}, N),
    (docci, {"split": "train"}, N),
    (dci, {}, 3),
    (dci, {"split": "all"}, N),
    (sharegpt4v, {"rows": f":{N}"}, N),
    (sharegpt4v, {"rows": "1:3"}, 2),
]


@pytest.mark.parametrize(("write", "options", "n"), LAYOUTS)
def test_a_set_is_read_by_its_layout_and_scored(tmp_path, write, options, n):
    path = str(write(tmp_path))
    if write is iiw:
        options = options | {"images": str(tmp_path / "docci" / "images_aar")}
    source = retrieval.read(retrieval.Options(path, **options))
    read = [" ".join(record.captions[0].split()) for record in source.records]
    assert len(read) == n and all(len(record.captions) == 1 for record in source.records)
    assert set(read) <= {caption(i) for i in range(N)} and len(set(read)) == n

    tasks = plugin.keyed("vlp.eval.tasks", {"retrieval": {"data": path, **options}})
    (record,) = evaluation.in_training(tiny(), tasks)
    assert record["counts"]["images"] == record["counts"]["captions"] == n
    assert record["counts"]["truncated_texts"] == n, "the tiny tower reads 16 tokens"


def test_images_that_are_not_there_and_broken_files_are_named(tmp_path):
    root = urban1k(tmp_path / "urban")
    (root / "image" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 4 annotations name images .*\n  2 "):
        open_source(str(root))
    assert open_source(str(root), missing="skip").skipped == ["2"]
    (root / "caption" / "3.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"caption/3\.txt is empty, expected a caption"):
        open_source(str(root))

    base = dci(tmp_path / "dci", "annotations") / "densely_captioned_images"
    with pytest.raises(DataError, match="lists train, test, no 'val'; pass split="):
        open_source(str(base.parent), "val")
    (base / "annotations" / "sa_1.json").write_text('{"image": "sa_1.jpg", "mask_data": {}}')
    with pytest.raises(DataError, match=r"sa_1\.json has no image or no short_caption; it holds"):
        open_source(str(base.parent))
    (base / "annotations" / "sa_1.json").write_text("[1")
    with pytest.raises(DataError, match=r"sa_1\.json is no JSON"):
        open_source(str(base.parent))
    (base / "annotations" / "sa_1.json").unlink()
    with pytest.raises(DataError, match=r"sa_1\.json cannot be read: No such file"):
        open_source(str(base.parent))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("first", "rows is 'first'; expected numbers of rows such as :1000"),
        ("-3:", "rows is '-3:'; expected numbers of rows"),
        ("90:", "has 5 rows, none of them in rows: 90:"),
    ],
)
def test_rows_that_are_no_range_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        retrieval.read(retrieval.Options(str(sharegpt4v(tmp_path)), rows=rows))
