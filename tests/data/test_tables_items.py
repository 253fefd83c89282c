"""Rows of a table as images: what is joined, what contradicts, and how names are found."""

from __future__ import annotations

import json

import pytest

from tests.data.table_layouts import jsonl, write
from vlp.data.archives import Archive
from vlp.data.listing import settle
from vlp.data.tables import TableOptions, items


def test_rows_that_cannot_be_used_are_named_each(tmp_path):
    content = [
        {"image": 3, "caption": "x"},
        {"image": "a", "caption": 5},
        {"caption": "x"},
        {"image": ["b", "c"], "caption": "y"},
    ]
    listing = items(write(tmp_path, "t.jsonl", jsonl(content)), TableOptions())
    assert [item.image for item in listing.items] == ["3"]

    places = [problem.split(": ", 1)[0] for problem in listing.problems]
    assert places == [f"{tmp_path}/t.jsonl:{line}" for line in (2, 3, 4)]

    classes = items(
        write(tmp_path, "c.csv", "image,class\na.jpg,cat\na.jpg,dog\nb.jpg,10\nc.jpg,9\n"),
        TableOptions(),
    )
    assert (
        "c.csv:3: image 'a.jpg' is of the class 'dog' here and of 'cat' in row 2"
        in classes.problems[0]
    )
    assert classes.classes == ["9", "10", "cat", "dog"]


def test_rows_of_one_image_are_joined_and_equal_captions_kept_once(tmp_path):
    content = [
        {"image": "a", "caption": "x", "n": 1},
        {"image": "b", "caption": "z"},
        {"image": "a", "caption": "y", "n": 2},
        {"image": "a", "caption": "x", "n": 1},
        {"image": "./b", "captions": None, "caption": "w"},
    ]
    listing = items(
        write(tmp_path, "t.jsonl", jsonl(content)), TableOptions(caption_columns="caption")
    )
    assert {item.image: item.captions for item in listing.items} == {
        "a": ["x", "y"],
        "b": ["z"],
        "./b": ["w"],
    }
    assert "rows of one image differ in n; the first row's values are kept" in listing.notes[0]


@pytest.mark.parametrize(
    "content",
    [
        "a one\thttps://x.y/z/p1.jpg?w=3&h=2\na two\thttps://x.y/z/p2.jpg?w=3&h=2\n",
        "image_url\tcaption\nhttps://x.y/p1.jpg?w=3\ta one\nhttp://x.y/p%32.jpg\ta two\n",
        "image\tcaption\n./photos/p1.jpg?raw=true\ta one\np2.jpg\ta two\n",
    ],
)
def test_addresses_are_found_by_the_name_in_them(tmp_path, content):
    for name in ("p1.jpg", "p2.jpg"):
        (tmp_path / name).write_bytes(b"x")
    archive = Archive(tmp_path)
    listing = items(write(tmp_path, "t.tsv", content), TableOptions())
    named = [(archive.find(item.image), item.captions) for item in listing.items]
    assert named == [("p1.jpg", ["a one"]), ("p2.jpg", ["a two"])]
    assert all(archive.agrees(item.image, name) for item, (name, _) in zip(listing.items, named))


def test_ids_of_coco_may_be_numbers_here_and_texts_there(tmp_path):
    content = {
        "images": [{"id": "1", "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": "2", "caption": "y"}],
    }
    listing = items(write(tmp_path, "c.json", json.dumps(content)), TableOptions())
    assert [(item.image, item.captions) for item in listing.items] == [
        ("a.jpg", ["x"]),
        ("b.jpg", ["y"]),
    ]


def test_spellings_of_one_image_are_one_item_and_may_not_contradict_each_other(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"x")
    content = [
        {"image": "a/1.png", "caption": "x", "class": "cat", "negatives": ["n"]},
        {"image": "./a/1.png", "caption": "y", "class": "cat", "negatives_of": [0]},
        {"image": "A/1.PNG", "caption": "z", "class": "dog"},
    ]
    archive = Archive(tmp_path)
    listing = items(write(tmp_path, "t.jsonl", jsonl(content)), TableOptions())
    named = [(item, archive.find(item.image)) for item in listing.items]
    ((item, name),), problems = settle(named, archive)
    assert (name, item.captions, item.class_name) == ("a/1.png", ["x", "y", "z"], "cat")
    assert problems == ["image 'a/1.png' is of the class 'dog' here and of 'cat' in row 1"]
    assert "negatives_of" not in item.meta  # it would number the captions of another row
