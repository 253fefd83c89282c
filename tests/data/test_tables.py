"""Tables of captions in every form: the reader, `pack` and the source `folder` read them alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.material import data_of, encoded, loader_of, picture
from tests.data.table_layouts import LAYOUTS, PHOTOS, coco, numbered, pairs_of, token, write
from vlp.cli import main
from vlp.config import Captions
from vlp.data.sources.folder import Options as FolderOptions
from vlp.data.sources.folder import open as open_folder
from vlp.data.sources.shards import Options as ShardOptions
from vlp.data.sources.shards import open as open_shards
from vlp.data.tables import TableOptions, items


def test_there_are_many_layouts():
    assert len(LAYOUTS) == 55 and len({name for name, _, _ in LAYOUTS}) == 55


@pytest.mark.parametrize(
    ("name", "content", "options"), LAYOUTS, ids=[name for name, _, _ in LAYOUTS]
)
def test_every_layout_gives_the_same_images_and_captions(tmp_path, name, content, options):
    assert pairs_of(write(tmp_path, name, content), **options) == PHOTOS


def test_kaggles_numbered_comments_are_read(tmp_path):
    expected = {
        name: [text.replace("|", "/") for text in captions] for name, captions in PHOTOS.items()
    }
    assert pairs_of(write(tmp_path, "results.csv", numbered())) == expected


TEN = (
    "plain.csv", "kaggle_captions.txt", "open_clip.csv", "Flickr8k.token.txt", "wide.csv",
    "a_line_a_caption.jsonl", "captions_val2017.json", "dataset_flickr8k.json",
    "map_of_texts.json", "lists.parquet",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(PHOTOS):
        (folder / name).write_bytes(
            encoded(picture(number), "PNG" if name.endswith("png") else "JPEG")
        )
    return folder


def pack(*arguments: str | Path) -> int:
    return main(["data", "pack", *map(str, arguments)])


def test_a_newcomers_ten_layouts_pack_and_train_alike(tmp_path, photos, capsys):
    contents = {name: content for name, content, _ in LAYOUTS}
    for name in TEN:
        table = write(tmp_path, name, contents[name])
        assert pack(photos, "--captions", table, "--to", tmp_path / f"packed {name}") == 0, name

        packed = open_shards(ShardOptions(str(tmp_path / f"packed {name}")), Captions())
        direct = open_folder(FolderOptions(path=str(photos), captions=str(table)), Captions())
        for source in (packed, direct):
            assert [list(source[i].captions) for i in range(len(source))] == list(
                PHOTOS.values()
            ), name
    assert capsys.readouterr().out.count("3 images with 5 captions") == len(TEN) == 10


def test_pack_says_which_columns_it_took_and_what_it_left_out(tmp_path, photos, capsys):
    table = write(
        tmp_path,
        "t.csv",
        "filepath;title;id;score\na.jpg;x;007;0.31\nb.jpg;;8;1\ngone.jpg;z;9;\nb;c\n",
    )
    assert pack(photos, "--captions", table, "--to", tmp_path / "out") == 1

    printed = capsys.readouterr()
    assert "t.csv: image ← filepath, captions ← title; left in the JSON: id, score" in printed.out
    assert (
        "t.csv:3: image 'b.jpg' has neither caption nor class" in printed.err
        and "t.csv:5: found 2 fields" in printed.err
    )
    assert pack(photos, "--captions", table, "--to", tmp_path / "out", "--on-missing", "skip") == 0

    said = (
        "left out: 1 rows that cannot be read, 1 without their image, "
        "1 with neither caption nor class"
    )
    assert said in capsys.readouterr().out

    meta = open_shards(ShardOptions(str(tmp_path / "out")), Captions())[0].meta
    assert meta["id"] == "007" and meta["score"] == 0.31


def test_split_lists_and_conditions_choose_rows(tmp_path, photos, capsys):
    """Flickr8k's lists of names; a column of splits; both for pack and for the source."""
    table = write(tmp_path, "Flickr8k.token.txt", token())
    chosen = write(tmp_path, "Flickr_8k.trainImages.txt", "a.jpg\nc.png\nnowhere.jpg\n")
    assert pack(photos, "--captions", table, "--only", chosen, "--to", tmp_path / "out") == 0

    printed = capsys.readouterr().out
    assert (
        "2 images with 4 captions" in printed and "1 names in" in printed and "'nowhere'" in printed
    )

    source = open_folder(
        FolderOptions(path=str(photos), captions=str(table), only=str(chosen)), Captions()
    )
    assert len(source) == 2

    stems = write(tmp_path, "stems.txt", "b\nphotos/c\n")
    assert list(pairs_of(table, only=str(stems))) == ["b.jpg", "c.png"]
    with pytest.raises(ValueError, match=r"no name in .*none\.txt is that of an image"):
        items(table, TableOptions(only=str(write(tmp_path, "none.txt", "x.jpg\n"))))

    split = write(
        tmp_path,
        "split.csv",
        "image,caption,Split,fold,ok\na.jpg,x,train,1,True\nb.jpg,y,test,2,False\n",
    )
    for where, image in [
        ({"split": "test"}, "b.jpg"),
        ({"fold": 1}, "a.jpg"),
        ({"ok": True}, "a.jpg"),
        ({"fold": "2.0"}, "b.jpg"),
        ({"split": ["val", "train"]}, "a.jpg"),
    ]:
        assert list(pairs_of(split, where=where)) == [image]
    assert (
        "rows of all splits are taken together (train (1), test (1))"
        in items(split, TableOptions()).notes[0]
    )
    assert (
        pack(
            photos,
            "--captions",
            split,
            "--where",
            "split=train",
            "--where",
            "split=test",
            "--to",
            tmp_path / "both",
        )
        == 0
    )
    assert "2 images with 2 captions" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"no row with Split = 'tset'; Split holds train \(1\), test \(1\)"
    ):
        items(split, TableOptions(where={"split": "tset"}))
    with pytest.raises(
        ValueError, match=r"no column 'part'.*columns: 'image', 'caption', 'Split', 'fold', 'ok'"
    ):
        items(split, TableOptions(where={"part": "x"}))


def test_annotations_of_images_that_cocos_file_does_not_list_are_refused_or_counted(
    tmp_path, photos, capsys
):
    content = json.loads(coco())
    content["images"] = content["images"][1:]  # a.jpg, with two captions
    table = write(tmp_path, "captions.json", json.dumps(content))
    refusal = r"captions\.json: annotations\[0\] names image 100, which .* remove the annotation"
    source = {"name": "folder", "path": str(photos), "captions": str(table)}
    with pytest.raises(ValueError, match=rf"2 rows cannot be used(.|\n)*{refusal}"):
        loader_of(data_of(source), 2)

    loader = loader_of(data_of({**source, "on_missing": "skip"}), 2)
    assert (loader.n_samples, loader.counters()["left_out_samples"]) == (2, 2)

    pack = ["data", "pack", str(photos), "--captions", str(table), "--to", str(tmp_path / "out")]
    assert main(pack) == 1
    assert "annotations[1] names image 100" in capsys.readouterr().err
    assert main([*pack, "--on-missing", "skip"]) == 0

    said = capsys.readouterr().out
    assert "left out: 2 rows that cannot be read" in said
    assert "2 images with 3 captions" in said


def test_the_folder_source_takes_what_the_table_reader_takes(tmp_path, photos):
    table = write(
        tmp_path, "t.csv", 'Bild;Worte;score\na.jpg;"x; y";0.5\nb.jpg;z;0.25\ngone.jpg;w;1\n'
    )
    source = {
        "name": "folder",
        "path": str(photos),
        "captions": str(table),
        "image_column": "bild",
        "caption_columns": ["worte"],
    }
    with pytest.raises(
        ValueError, match=r"1 rows cannot be used, 1 of them .*\n.*t\.csv:4: no image 'gone\.jpg'"
    ):
        loader_of(data_of(source), 2)

    batch = next(loader_of(data_of({**source, "on_missing": "skip", "separator": ";"}), 2))
    assert sorted(batch.score.tolist()) == [0.25, 0.5]


def test_captions_that_programs_write_for_none_are_told(tmp_path, photos):
    table = write(tmp_path, "t.csv", "image,caption\na.jpg,nan\nb.jpg,None\nc.png,a nan\n")
    (note,) = items(table, TableOptions()).notes
    assert "'nan' (1), 'None' (1); empty the cells" in note
