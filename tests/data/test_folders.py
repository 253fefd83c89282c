"""Folders and tars of pictures with texts beside them: `pack` and the sources read them alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.folder_material import TEMPLATES, both, pack, packed, put
from tests.data.material import data_of, encoded, loader_of, picture
from vlp.data.archives import Archive
from vlp.data.trees import read_tree


def img2dataset_files(root: Path) -> Path:
    """What img2dataset writes with output_format=files: numbered folders, a parquet and statistics
    beside them."""
    for i in range(4):
        name = f"0000{i // 2}/0000{i // 2}{i:04d}"
        meta = {
            "caption": f"caption {i}",
            "url": f"http://x/{i}.jpg",
            "key": f"0000{i // 2}{i:04d}",
            "similarity": 0.5 + i,
        }
        put(root, f"{name}.jpg", data=encoded(picture(i), "JPEG"))
        put(root, f"{name}.txt", data=f"caption {i}".encode())
        put(root, f"{name}.json", data=json.dumps(meta).encode())
    return put(root, "00000_stats.json", "00000.parquet", data=b"{}")


def test_img2datasets_files_are_pairs_for_pack_and_for_training(tmp_path, capsys):
    root = img2dataset_files(tmp_path / "laion")
    n_cases = 0
    for source in both(tmp_path, root):
        out = tmp_path / f"out{n_cases}"
        assert pack(source, "--to", out) == 0

        said = capsys.readouterr().out
        assert "4 images with 4 captions and 0 classes" in said
        assert "left out: 1 .parquet" in said and "1 .json without an image" in said

        samples = packed(out)
        assert [s.captions for s in samples] == [(f"caption {i}",) for i in range(4)]
        assert [s.meta["similarity"] for s in samples] == [0.5, 1.5, 2.5, 3.5]

        direct = loader_of(data_of({"name": "folder", "path": str(source)}), 4)
        shards = loader_of(data_of(out), 4)
        one, other = next(direct), next(shards)
        assert one.text.equal(other.text) and one.image.equal(other.image)
        with pytest.raises(ValueError, match=r"texts beside them; use \{name: folder\}"):
            loader_of(data_of({"name": "classes", "path": str(source)}, captions=TEMPLATES), 4)

        n_cases += 1
    assert n_cases == 2


@pytest.mark.parametrize(
    ("texts", "captions"),
    [
        ({"a.txt": "one"}, ["one"]),
        ({"a.TXT": "one"}, ["one"]),
        ({"a.caption": "one"}, ["one"]),
        ({"a.json": '{"caption": "one"}'}, ["one"]),
        ({"a.json": '{"captions": ["one", "two"]}', "a.txt": "three"}, ["one", "two"]),
        ({"a.JPG.txt": "one"}, ["one"]),
        ({"a.JPG.json": '{"caption": "one"}', "a.txt": "two"}, ["one"]),
    ],
)
@pytest.mark.parametrize("folder", ["", "deep/er/", "with blank/"])
def test_texts_belong_to_the_picture_of_their_name_at_any_depth(tmp_path, texts, captions, folder):
    put(tmp_path, f"{folder}a.JPG", data=encoded(picture(1), "JPEG"))
    for name, text in texts.items():
        put(tmp_path, folder + name, data=text.encode())
    (item,) = read_tree(Archive(tmp_path)).items
    assert (item.captions, item.image) == (captions, f"{folder}a.JPG")


def test_pictures_without_a_text_among_pairs_are_refused_or_counted(tmp_path, capsys):
    root = put(put(tmp_path / "p", "a/1.png", "a/2.png", "b/3.png"), "a/1.txt", data=b"one")
    put(root, "b/3.json", data=b"{not json")
    assert pack(root, "--to", tmp_path / "out") == 1

    said = capsys.readouterr().err
    assert "'a/2.png' has no text beside it (2.txt, 2.json or 2.caption)" in said
    assert "the text beside 'b/3.png' cannot be used: not valid JSON" in said
    assert (
        "2 images or folders cannot be packed; nothing was written" in said
        and not (tmp_path / "out").exists()
    )
    assert pack(root, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    assert (
        "left out: 2 images or folders that cannot be used" in capsys.readouterr().out
        and len(packed(tmp_path / "out")) == 1
    )
    with pytest.raises(ValueError, match="on_missing: skip leaves them out"):
        loader_of(data_of({"name": "folder", "path": str(root)}), 1)

    loader = loader_of(data_of({"name": "folder", "path": str(root), "on_missing": "skip"}), 1)
    assert loader.counters()["left_out_samples"] == 2


def test_texts_that_hold_no_caption_do_not_make_folders_classes(tmp_path):
    root = put(put(tmp_path, "cat/1.png", "dog/1.png"), "cat/1.json", data=b'{"shapes": []}')
    put(root, "texts/1.txt", data=b"a text")
    with pytest.raises(
        ValueError,
        match=r"1 of 2 images have a text .*none a caption(.|\n)*keys shapes; found 1 \.txt ",
    ):
        read_tree(Archive(root))


@pytest.mark.parametrize(
    ("pictures", "others", "named"),
    [
        (["Images/1.jpg", "Images/2.jpg"], ["captions.txt"], "captions.txt"),
        (["Flicker8k/1.jpg"], ["text/Flickr8k.token.txt", "readme.txt"], "text/Flickr8k.token.txt"),
        (["images/1.jpg"], ["train.jsonl", "old.tsv"], "old.tsv"),
        (["1.jpg", "2.jpg"], ["metadata.jsonl"], "metadata.jsonl"),
    ],
)
def test_a_table_beside_the_pictures_is_named(tmp_path, capsys, pictures, others, named):
    root = put(put(tmp_path / "t", *pictures), *others, data=b"x")
    assert pack(root, "--to", tmp_path / "out") == 1
    assert f"name a table of captions: --captions {root}/{named} (" in capsys.readouterr().err
    with pytest.raises(ValueError, match=rf"captions: {root}/{named}; vlp eval: --data"):
        loader_of(data_of({"name": "folder", "path": str(root)}), 2)


def test_texts_in_folders_of_their_own_are_not_lost(tmp_path):
    layouts = (
        (["images/1.png", "images/2.png"], ["a/captions/1.txt", "b/captions/2.txt"]),
        (["images/cat/1.png", "images/dog/2.png"], ["text/1.txt", "text/2.txt"]),
        (["1.png", "2.png"], ["labels/1.json", "labels/2.json"]),
    )
    for number, (pictures, texts) in enumerate(layouts):
        root = put(put(tmp_path / f"{number}", *pictures), *texts, data=b"a text")
        with pytest.raises(ValueError, match=rf"2 texts .*\(as {texts[0]} for {pictures[0]}"):
            read_tree(Archive(root))
    assert number == 2


def test_splits_of_pairs_are_refused_too(tmp_path):
    put(put(tmp_path, "train/1.png", "val/1.png"), "train/1.txt", "val/1.txt", data=b"x")
    with pytest.raises(ValueError, match="holds splits"):
        read_tree(Archive(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.png", "b.png"],
            r"its 2 images lie outside of any folder, and none has a text .*--captions TABLE",
        ),
        (["00000.tar"], r"holds no images; found 1 \.tar .*train on them with \{name: shards\}"),
        (["a/x.webm"], r"holds no images; found 1 \.webm"),
        (["a/x.txt", "b.txt", "c.json"], r"holds no images; found 2 \.txt, 1 \.json"),
        ([], "holds no images$"),
    ],
)
def test_folders_without_usable_pictures_say_what_is_there(tmp_path, names, message):
    (tmp_path / "t").mkdir()
    with pytest.raises(ValueError, match=message):
        read_tree(Archive(put(tmp_path / "t", *names)))


@pytest.mark.parametrize(
    ("start", "command"),
    [
        (b"\x1f\x8b\x08", "compressed with gzip; unpack it first"),
        (b"PK\x03\x04", "a zip archive; unpack it"),
        (b"BZh9", "compressed with bzip2; unpack it first"),
    ],
)
def test_packed_archives_say_how_to_unpack_them(tmp_path, start, command):
    (tmp_path / "x.tar").write_bytes(start + bytes(600))
    with pytest.raises(ValueError, match=command):
        Archive(tmp_path / "x.tar")


def test_options_of_tables_are_refused_where_there_is_none(tmp_path, capsys):
    root = put(tmp_path / "t", "cat/1.png", "dog/1.png")
    assert pack(root, "--where", "split=train", "--to", tmp_path / "out") == 1
    assert "--where choose from a table; name it with --captions TABLE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="where choose from a table"):
        data_of({"name": "folder", "path": str(root), "where": {"split": "train"}})
    with pytest.raises(
        ValueError, match=r"one folder a class and no text beside an image; use \{name: classes\}"
    ):
        loader_of(data_of({"name": "folder", "path": str(root)}), 2)
