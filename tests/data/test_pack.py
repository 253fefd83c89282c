"""`vlp data pack` and the sources that read the same inputs directly."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from tests.data.material import REAL, data_of, encoded, loader_of, needs_data, picture, write_tar
from vlp.cli import main
from vlp.config import Captions
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.tables import TableOptions, items

ROWS = [
    {"image": "a/0.png", "caption": 'zero, "quoted"', "split": "train", "n": 1},
    {"image": "a/1.png", "caption": "one", "split": "test", "n": 2},
    {"image": "a/0.png", "caption": "zero again", "split": "train", "n": 3},
    {"image": "2.jpg", "caption": "zwei größer", "split": "train", "n": 4},
]


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for name, kind in (("a/0.png", "PNG"), ("a/1.png", "PNG"), ("2.jpg", "JPEG")):
        (folder / name).write_bytes(encoded(picture(len(name)), kind))
    return folder


def table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".csv":
        import csv

        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def pack(*arguments: str | Path) -> int:
    return main(["data", "pack", *map(str, arguments)])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("as_tar", [False, True])
def test_photos_with_a_table_become_shards_and_the_folder_source_agrees(
    tmp_path, photos, kind, as_tar, capsys
):
    captions = table(tmp_path / f"t.{kind}", ROWS)
    source = photos
    if as_tar:
        names = ("a/0.png", "a/1.png", "2.jpg")
        source = write_tar(
            tmp_path / "photos.tar", [(name, (photos / name).read_bytes()) for name in names]
        )
    assert (
        pack(source, "--captions", captions, "--to", tmp_path / "out", "--samples-per-shard", 2)
        == 0
    )
    assert "3 images with 4 captions and 0 classes in 2 shards" in capsys.readouterr().out

    packed = open_shards(Options(str(tmp_path / "out")), Captions())
    assert [packed[i].captions for i in range(3)] == [
        ('zero, "quoted"', "zero again"),
        ("one",),
        ("zwei größer",),
    ]
    assert packed[2].image == (photos / "2.jpg").read_bytes() and packed[2].image_type == "jpg"
    assert (
        packed[0].meta["image"] == "a/0.png"
        and packed[0].meta["split"] == "train"
        and packed[0].meta["n"] == 1
    )

    direct = loader_of(
        data_of({"name": "folder", "path": str(source), "captions": str(captions)}), 3
    )
    shards = loader_of(data_of(tmp_path / "out"), 3)
    for _ in range(4):
        a, b = next(direct), next(shards)
        assert (
            torch.equal(a.image, b.image)
            and torch.equal(a.text, b.text)
            and torch.equal(a.sample_id, b.sample_id)
        )


def test_rows_that_name_missing_images_are_each_reported_and_nothing_is_written(
    tmp_path, photos, capsys
):
    rows = [
        *ROWS,
        {**ROWS[0], "image": "gone.png"},
        {**ROWS[0], "image": "../outside.png"},
        {**ROWS[0], "image": "x.tif"},
    ]
    (tmp_path / "outside.png").write_bytes(encoded(picture(1)))
    captions = table(tmp_path / "t.csv", rows)
    assert pack(photos, "--captions", captions, "--to", tmp_path / "out") == 1

    said = capsys.readouterr().err
    for line, name in ((6, "gone.png"), (7, "../outside.png"), (8, "x.tif")):
        assert f"t.csv:{line}: image '{name}' is" in said
    assert (
        "3 rows cannot be packed; nothing was written" in said and not (tmp_path / "out").exists()
    )
    assert (
        pack(photos, "--captions", captions, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    )
    assert "gone.png" in capsys.readouterr().err
    assert len(open_shards(Options(str(tmp_path / "out")), Captions())) == 3

    folder = {"name": "folder", "path": str(photos), "captions": str(captions)}
    refused = (
        r"3 rows cannot be used, 3 of them name images that are not there; "
        r"on_missing: skip(.|\n)*t.csv:6: no image 'gone"
    )
    with pytest.raises(ValueError, match=refused):
        loader_of(data_of(folder), 3)
    assert (
        loader_of(data_of({**folder, "on_missing": "skip"}), 3).counters()["left_out_samples"] == 3
    )


def test_class_folders_become_classes(tmp_path, capsys):
    for name in ("red_fox", "axolotl"):
        (tmp_path / "tree" / name / "deep").mkdir(parents=True)
        for i in range(2):
            (tmp_path / "tree" / name / "deep" / f"{i}.png").write_bytes(encoded(picture(i)))
    assert pack(tmp_path / "tree", "--to", tmp_path / "out") == 0
    assert (tmp_path / "out" / "classnames.txt").read_text() == "axolotl\nred fox\n"

    captions = Captions(class_templates=["a {}."])
    packed = open_shards(Options(str(tmp_path / "out")), captions)
    assert [(packed[i].captions, packed[i].meta["cls"]) for i in (0, 3)] == [
        (("a axolotl.",), 0),
        (("a red fox.",), 1),
    ]

    classes = data_of(
        {"name": "classes", "path": str(tmp_path / "tree")}, captions={"class_templates": ["a {}."]}
    )
    shards = data_of(tmp_path / "out", captions={"class_templates": ["a {}."]})
    assert torch.equal(next(loader_of(classes, 4)).text, next(loader_of(shards, 4)).text)

    (tmp_path / "tree" / "loose.png").write_bytes(encoded(picture(1)))
    assert pack(tmp_path / "tree", "--to", tmp_path / "other") == 1
    assert "'loose.png' lies outside of any class folder" in capsys.readouterr().err


def test_an_output_that_holds_something_is_kept_unless_overwriting_is_asked_for(
    tmp_path, photos, capsys
):
    captions, out = table(tmp_path / "t.csv", ROWS), tmp_path / "out"
    assert pack(photos, "--captions", captions, "--to", out, "--samples-per-shard", 1) == 0

    before = sorted(out.iterdir())
    assert pack(photos, "--captions", captions, "--to", out) == 1
    assert "is not empty" in capsys.readouterr().err and sorted(out.iterdir()) == before

    table(captions, [{**ROWS[0], "image": "gone.png"}])
    assert (
        pack(photos, "--captions", captions, "--to", out, "--overwrite") == 1
        and sorted(out.iterdir()) == before
    )

    table(captions, ROWS[:1])
    assert pack(photos, "--captions", captions, "--to", out, "--overwrite") == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000.tar", "00000_stats.json", "_index.bin"]
    assert pack(photos, "--captions", captions, "--to", photos, "--overwrite") == 1
    assert "no pack wrote" in capsys.readouterr().err and (photos / "2.jpg").exists()
    # No partial output is left.
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out",
        "photos",
        "t.csv",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "splitt=train"], "no column 'splitt', did you mean 'split'"),
        (["--where", "split"], "COLUMN=VALUE"),
        (
            ["--where", "split=dev"],
            r"no row with split = 'dev'; split holds train \(3\), test \(1\)",
        ),
        (["--caption-column", "capton"], "did you mean 'caption'"),
        (["--image-column", "img"], "no column 'img'"),
    ],
)
def test_wrong_options_say_what_is_there(tmp_path, photos, capsys, arguments, message):
    import re

    assert (
        pack(
            photos,
            "--captions",
            table(tmp_path / "t.csv", ROWS),
            "--to",
            tmp_path / "out",
            *arguments,
        )
        == 1
    )
    assert re.search(message, capsys.readouterr().err)


def test_parts_of_a_table_number_their_classes_alike(tmp_path):
    path = table(
        tmp_path / "t.jsonl",
        [{"image": f"{i}.png", "class": "cba"[i], "split": "st"[i % 2]} for i in range(3)],
    )
    parts = [items(path, TableOptions(where={"split": split})) for split in "st"]
    assert [part.classes for part in parts] == [["a", "b", "c"]] * 2
    assert [[item.class_name for item in part.items] for part in parts] == [["c", "a"], ["b"]]


def test_parts_by_name_are_disjoint_and_together_everything(tmp_path, capsys):
    """By a hash of the name: the same split of twelve photos in every call."""
    (tmp_path / "tree" / "fox").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "tree" / "fox" / f"{i}.png").write_bytes(encoded(picture(i)))
    sizes = {}
    for part in ("1,2/3", "3/3", "1/1"):
        folder = tmp_path / part.replace("/", "_")
        assert pack(tmp_path / "tree", "--part", part, "--to", folder) == 0
        packed = open_shards(Options(str(folder)), Captions(class_templates=["{}"]))
        sizes[part] = sorted(packed[i].image for i in range(len(packed)))
    assert sorted(sizes["1,2/3"] + sizes["3/3"]) == sizes["1/1"]
    assert 0 < len(sizes["3/3"]) < len(sizes["1,2/3"]) < len(sizes["1/1"]) == 12
    assert pack(tmp_path / "tree", "--part", "4/3", "--to", tmp_path / "none") == 1
    assert "not of the form K/N" in capsys.readouterr().err


@needs_data
def test_real_photos_in_clip_benchmarks_layout(tmp_path):
    """The files that clip_benchmark's build_wds_dataset reads, with the decoding and tuples that it
    asks webdataset for.
    """
    import webdataset

    table_of = {name: ["--captions", REAL / f"{name}.jsonl"] for name in ("clothing", "coco_open")}
    arguments = [
        "--to",
        tmp_path / "c",
        "--where",
        "split=test",
        "--layout",
        "clip_benchmark",
        "--samples-per-shard",
        400,
    ]
    assert (
        pack(
            REAL / "clothing.tar",
            *table_of["clothing"],
            *arguments,
            "--template",
            "a photo of a {}.",
        )
        == 0
    )

    n_shards = int((tmp_path / "c/test/nshards.txt").read_text())
    classes = (tmp_path / "c/classnames.txt").read_text().splitlines()
    assert (
        tmp_path / "c/zeroshot_classification_templates.txt"
    ).read_text() == "a photo of a {c}.\n"

    urls = [str(tmp_path / f"c/test/{i}.tar") for i in range(n_shards)]
    rows = list(
        webdataset.WebDataset(urls, shardshuffle=False).to_tuple("webp;png;jpg;jpeg", "cls")
    )
    lines = [json.loads(line) for line in (REAL / "clothing.jsonl").read_text().splitlines()]
    expected = [line for line in lines if line["split"] == "test"]
    assert n_shards == 3 and len(classes) == 10 and len(rows) == len(expected)
    assert [classes[int(label)] for _, label in rows] == [line["class"] for line in expected]

    assert (
        pack(
            REAL / "coco_open.tar",
            *table_of["coco_open"],
            "--to",
            tmp_path / "r",
            "--layout",
            "clip_benchmark",
        )
        == 0
    )
    assert (tmp_path / "r/dataset_type.txt").read_text() == "retrieval\n" and not (
        tmp_path / "r/classnames.txt"
    ).exists()

    rows = list(
        webdataset.WebDataset([str(tmp_path / "r/test/0.tar")], shardshuffle=False).to_tuple(
            "webp;png;jpg;jpeg", "txt"
        )
    )
    assert len(rows) == 111 and all(len(text.decode().split("\n")) >= 5 for _, text in rows)

    with tarfile.open(REAL / "coco_open.tar") as tar:
        assert rows[0][0] == tar.extractfile(tar.getmembers()[0]).read()
    assert Image.open(io.BytesIO(rows[0][0])).format == "JPEG"


def test_help_needs_no_torch():
    code = (
        "import sys, vlp.data_tools.pack; "
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
