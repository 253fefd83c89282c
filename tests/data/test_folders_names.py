"""Names of pictures that tables spell in their own way."""

from __future__ import annotations

import json
import unicodedata

from tests.data.folder_material import both, pack, packed, put
from tests.data.material import data_of, loader_of
from vlp.data.archives import Archive

STORED = [
    "a/p10.jpg",
    "a/P1.jpg",
    "b/P1.jpg",
    "val/1.jpg",
    "val/x/2.png",
    "x y/é.png",
    "top.JPG",
    "n/3.jpg",
    "n/3.png",
]


SPELLINGS = [
    ("a/p10.jpg", "a/p10.jpg"),
    ("./a//p10.jpg", "a/p10.jpg"),
    ("a\\p10.jpg", "a/p10.jpg"),
    (" a/p10.jpg ", "a/p10.jpg"),
    ("p10.jpg", "a/p10.jpg"),
    ("p10", "a/p10.jpg"),
    ("a/p10", "a/p10.jpg"),
    ("p10.JPG", "a/p10.jpg"),
    ("A/P10.JPG", "a/p10.jpg"),
    ("a/p10.png", "a/p10.jpg"),
    ("photos/a/p10.jpg", "a/p10.jpg"),
    ("C:\\data\\photos\\a\\p10.jpg", "a/p10.jpg"),
    ("{root}/a/p10.jpg", "a/p10.jpg"),
    ("file://{root}/a/p10.jpg", "a/p10.jpg"),
    ("../photos/a/p10.jpg", "a/p10.jpg"),
    ("b/../a/p10.jpg", "a/p10.jpg"),
    ("val2017/1.jpg", "val/1.jpg"),
    ("x/2.png", "val/x/2.png"),
    ("x%20y/%C3%A9.png", "x y/é.png"),
    (unicodedata.normalize("NFD", "x y/é.png"), "x y/é.png"),
    ("top.jpg", "top.JPG"),
    ("{root}/top", "top.JPG"),
    ("n/3.png", "n/3.png"),
    ("n/3.JPG", "n/3.jpg"),
    ("a/P1.jpg", "a/P1.jpg"),
    ("a/p1.jpg", "a/P1.jpg"),
    # Not found: ambiguous, another folder that is there, outside, nothing.
    ("P1.jpg", None),
    ("c/P1.jpg", None),
    ("n/3", None),
    ("b/p10.jpg", None),
    ("val/2.png", None),
    ("../outside.jpg", None),
    ("{root}/../outside.jpg", None),
    ("/etc/passwd", None),
    ("", None),
    ("/", None),
    ("..", None),
    ("p1\0.jpg", None),
]


def test_a_name_is_found_however_a_table_spells_it(tmp_path):
    root = put(tmp_path / "photos", *STORED)
    put(tmp_path, "outside.jpg")
    n_cases = 0
    for source in both(tmp_path, root):
        archive = Archive(source)
        for name, stored in SPELLINGS:
            assert archive.find(name.replace("{root}", str(root))) == stored, name
            n_cases += 1
    assert n_cases == 2 * 38


def test_a_name_that_is_not_found_says_why(tmp_path):
    archive = Archive(put(tmp_path / "photos", *STORED))
    assert archive.why_not("P1.jpg").endswith(
        "photos: 'a/P1.jpg', 'b/P1.jpg'; name it with its folder"
    )
    assert "is missing in" in archive.why_not("a/p100.jpg") and "'a/p10.jpg'" in archive.why_not(
        "a/p100.jpg"
    )
    assert "'a/p10.jpg'" in archive.why_not("b/p10.jpg")
    assert archive.why_not("zebra.jpg").endswith("photos")


def test_the_file_systems_order_of_spellings_decides_nothing(tmp_path):
    """Composed and decomposed, or upper and lower case, side by side: the exact one is found."""
    names = ["é.png", unicodedata.normalize("NFD", "é.png"), "A.png", "a.png"]
    archive = Archive(put(tmp_path, *names))
    assert [archive.find(name) for name in names] == names


def test_two_names_of_one_picture_are_one_sample_unless_they_contradict_each_other(
    tmp_path, capsys
):
    root = put(tmp_path / "p", "val/1.png", "val/2.png")
    rows = [
        {"image": "val/1.png", "caption": "one"},
        {"image": "./val/1.png", "caption": "again"},
        {"image": "1.png", "caption": "one"},
        {"image": "val/2.png", "caption": "two"},
        {"image": "train/2.png", "caption": "another picture"},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = ["--captions", tmp_path / "t.jsonl"]
    assert pack(root, *table, "--to", tmp_path / "out") == 1
    assert "image 'train/2.png' is missing in" in capsys.readouterr().err
    assert pack(root, *table, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    assert [sample.captions for sample in packed(tmp_path / "out")] == [("one", "again"), ("two",)]

    direct = {
        "name": "folder",
        "path": str(root),
        "captions": str(tmp_path / "t.jsonl"),
        "on_missing": "skip",
    }
    assert loader_of(data_of(direct), 2).n_samples == 2


def test_many_names_of_one_ending_are_found_quickly():
    """Folders with the same file names in each: a look-up must not visit all of them."""
    import time

    from vlp.data.names import Names

    names = Names(sorted(f"{folder}/{i}.jpg" for folder in range(2000) for i in range(20)))
    started = time.perf_counter()
    assert all(names.find(f"photos/{folder}/7.JPG") == f"{folder}/7.jpg" for folder in range(2000))
    assert time.perf_counter() - started < 3
