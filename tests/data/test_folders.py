"""Folders and tars without a table, and names that tables spell in their own way: `pack` and the
sources read them alike."""

from __future__ import annotations

import json
import os
import signal
import unicodedata
from pathlib import Path

import pytest

from tests.data.material import data_of, encoded, loader_of, picture, write_tar
from vlp.cli import main
from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data.trees import read_tree

TEMPLATES = {"class_templates": ["a {}."]}


def put(root: Path, *names: str, data: bytes | None = None) -> Path:
    """Files below `root`: pictures where no data are given."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(i)) if data is None else data)
    return root


def pack(*arguments: str | Path) -> int:
    return main(["data", "pack", *map(str, arguments)])


def packed(folder: Path, **captions) -> list:
    source = open_shards(Options(str(folder)), Captions(**captions))
    return [source[i] for i in range(len(source))]


def both(tmp_path: Path, root: Path) -> list[Path]:
    """The folder, and a tar of the same files."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    members = [(f"./{path.relative_to(root).as_posix()}", path.read_bytes()) for path in files]
    return [root, write_tar(tmp_path / "as.tar", members)]


# --- pictures with texts beside them --------------------------------------------------------------


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
    with pytest.raises(
        ValueError, match=r"1 of 2 images have a text beside them, none a caption(.|\n)*keys shapes"
    ):
        read_tree(Archive(root))


# --- one folder a class ---------------------------------------------------------------------------


def test_hidden_and_system_names_are_never_classes_or_pictures(tmp_path, capsys):
    root = put(tmp_path / "t", "cat/1.png", "dog/2.PNG", "dog/more/3.png")
    hidden = [
        ".ipynb_checkpoints/1.png",
        "__MACOSX/cat/._1.png",
        "cat/._1.png",
        "dog/@eaDir/2.png",
        "lost+found/x.png",
        "cat/.ipynb_checkpoints/1-checkpoint.png",
        "$RECYCLE.BIN/4.png",
    ]
    put(root, *hidden)
    put(root, "cat/Thumbs.db", ".DS_Store", "dog/desktop.ini", data=b"x")
    n_cases = 0
    for source in both(tmp_path, root):
        archive = Archive(source)
        tree = read_tree(archive)
        assert [item.image for item in tree.items] == ["cat/1.png", "dog/2.PNG", "dog/more/3.png"]
        assert (tree.classes, tree.problems) == (["cat", "dog"], [])
        # In a folder a hidden folder counts once, in a tar each of its members does.
        assert archive.left_out.counts["hidden"] == 10
        out = tmp_path / f"out{n_cases}"
        assert pack(source, "--to", out) == 0
        said = capsys.readouterr().out
        assert "3 images with 0 captions and 2 classes" in said and "left out: 10 hidden (" in said
        n_cases += 1
    assert n_cases == 2


def test_links_are_followed_once_and_loops_and_broken_ones_counted(tmp_path, capsys):
    store = put(tmp_path / "store", "dogs/1.png", "fox.png")
    root = put(tmp_path / "t", "cat/1.png")
    (root / "dog").symlink_to(store / "dogs")
    (root / "cat" / "2.png").symlink_to(store / "fox.png")
    (root / "cat" / "self").symlink_to(root)
    (root / "hound").symlink_to(store / "dogs")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "around.png").symlink_to(root / "cat" / "around.png")
    archive = Archive(root)
    assert archive.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
    assert archive.left_out.counts == {
        "links to folders that are read already": 2,
        "broken links": 2,
    }
    assert sorted(archive.outside) == ["cat/2.png", "dog", "hound"]
    assert pack(root, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    said = capsys.readouterr().out
    assert "3 images with 0 captions and 2 classes" in said
    assert "3 links lead out of" in said and f"dog -> {store / 'dogs'}" in said
    assert pack(root, "--to", tmp_path / "inside", "--on-missing", "skip", "--links", "inside") == 0
    said = capsys.readouterr().out
    assert (
        "1 images with 0 captions and 1 classes" in said
        and "3 links that lead out of the folder" in said
    )


def test_all_class_folders_may_be_links(tmp_path):
    store = put(tmp_path / "store", "x/1.png", "y/1.png")
    root = tmp_path / "t"
    root.mkdir()
    for name, target in (("cat", "x"), ("dog", "y")):
        (root / name).symlink_to(os.path.relpath(store / target, root))
    assert read_tree(Archive(root)).classes == ["cat", "dog"]


def test_files_that_are_no_pictures_are_counted_and_an_empty_class_is_refused(tmp_path, capsys):
    root = put(tmp_path / "t", "cat/1.png", "dog/1.png")
    put(root, "cat/1.webm", "cow/1.webm", "cow/2.webm", "cow/notes.txt", "cat/README", data=b"x")
    (root / "owl").mkdir()
    os.mkfifo(root / "cat" / "pipe.png")  # opening it would wait for ever
    assert pack(root, "--to", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "the class folder 'cow' holds no image (found 2 .webm, 1 .txt)" in said
    assert "the class folder 'owl' holds no image (found nothing)" in said
    assert pack(root, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    said = capsys.readouterr().out
    assert "2 classes" in said
    for part in (
        "2 images or folders that cannot be used",
        "3 .webm (cat/1.webm, cow/1.webm, cow/2.webm)",
        "1 of no known kind (cat/README)",
        "1 .txt without an image",
        "1 no regular file (cat/pipe.png)",
    ):
        assert part in said, part
    with pytest.raises(ValueError, match=r"'cow' holds no image(.|\n)*'owl'"):
        data = data_of({"name": "classes", "path": str(root)}, captions=TEMPLATES)
        loader_of(data, 2)
    data = data_of({"name": "classes", "path": str(root), "on_missing": "skip"}, captions=TEMPLATES)
    assert any("left out 3 .webm" in line for line in loader_of(data, 2).problems())


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "val"), "train, val"),
        (("Training", "Test"), "Test, Training"),
        (("train2017", "val2017"), "train2017, val2017"),
        (("train", "test", "validation", "extra"), "test, train, validation"),
        (("train",), "train"),
        (("test_images", "train_images"), "test_images, train_images"),
        (("images_test", "images_train"), "images_test, images_train"),
        (("seg_pred", "seg_test", "seg_train"), "seg_test, seg_train"),
        (("train", "unlabeled"), "train, unlabeled"),
        (("fold1", "fold2"), "fold1, fold2"),
    ],
)
def test_a_root_of_splits_is_refused_with_the_folder_to_name(tmp_path, capsys, folders, splits):
    root = put(
        tmp_path / "root",
        *(f"{folder}/{name}/1.png" for folder in folders for name in ("cat", "dog")),
    )
    first = splits.split(", ")[0]
    n_cases = 0
    for source in both(tmp_path, root):
        assert pack(source, "--to", tmp_path / "out") == 1
        said = capsys.readouterr().err
        place = f"{source}/{first}, or " if source.is_dir() else ""
        assert (
            f"holds splits, not classes: {splits}; give one of them, such as {place}"
            f"--split-folder {first} (configuration: split: {first}; vlp eval: split={first})"
        ) in said
        assert pack(source, "--split-folder", first, "--to", tmp_path / f"out{n_cases}") == 0
        assert (tmp_path / f"out{n_cases}" / "classnames.txt").read_text() == "cat\ndog\n"
        classes = {"name": "classes", "path": str(source)}
        with pytest.raises(ValueError, match="holds splits"):
            loader_of(data_of(classes, captions=TEMPLATES), 2)
        assert loader_of(data_of({**classes, "split": first}, captions=TEMPLATES), 2).n_samples == 2
        assert pack(source, "--split-folder", "vali", "--to", tmp_path / "none") == 1
        assert (
            f"holds no folder 'vali'; there are: {', '.join(sorted(folders))}"
            in capsys.readouterr().err
        )
        n_cases += 1
    assert n_cases == 2


@pytest.mark.parametrize(
    "classes", [["bus", "car", "train"], ["bullet train", "toy train"], ["kitchen", "gallery"]]
)
def test_a_class_called_train_beside_others_is_a_class(tmp_path, classes):
    root = put(tmp_path, *(f"{name}/1.png" for name in classes))
    assert read_tree(Archive(root)).classes == sorted(classes)


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
        (["images/1.png", "images/2.png"], ["captions/1.txt", "captions/2.txt"]),
        (["images/cat/1.png", "images/dog/2.png"], ["text/cat/1.txt", "text/dog/2.txt"]),
        (["1.png", "2.png"], ["labels/1.json", "labels/2.json"]),
    )
    for number, (pictures, texts) in enumerate(layouts):
        root = put(put(tmp_path / f"{number}", *pictures), *texts, data=b"a text")
        with pytest.raises(ValueError, match=rf"2 texts .*\(as {texts[0]} for {pictures[0]}"):
            read_tree(Archive(root))
    assert number == 2


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    root = put(tmp_path / "all", "mine/cat/1.png", "mine/dog/1.png", "other/cow/1.png") / "mine"
    (root / "up").symlink_to("..")
    archive = Archive(root)
    assert read_tree(archive).classes == ["cat", "dog"]
    assert "1 links to a folder that holds this one (up)" in str(archive.left_out)


def test_splits_of_pairs_are_refused_too(tmp_path):
    put(put(tmp_path, "train/1.png", "val/1.png"), "train/1.txt", "val/1.txt", data=b"x")
    with pytest.raises(ValueError, match="holds splits"):
        read_tree(Archive(tmp_path))


def test_a_folder_that_only_wraps_the_tree_is_refused_with_the_one_to_name(tmp_path):
    root = put(tmp_path / "r", "Data/101/cat/1.png", "Data/101/dog/1.png")
    with pytest.raises(
        ValueError,
        match=r"one folder, 'Data/101', and below it 2 .*if those are the classes, give .*/r/Data/101",
    ):
        read_tree(Archive(root))
    assert read_tree(Archive(root / "Data" / "101")).classes == ["cat", "dog"]


def test_numbers_and_single_classes_are_taken_and_said(tmp_path, capsys):
    assert (
        pack(put(tmp_path / "n", "0/1.png", "10/1.png", "9/1.png"), "--to", tmp_path / "out") == 0
    )
    assert "note: the folders' names are numbers (0 to 10)" in capsys.readouterr().out
    assert pack(put(tmp_path / "s", "cat/deep/1.png"), "--to", tmp_path / "single") == 0
    assert "note: there is one class folder only, 'cat'" in capsys.readouterr().out
    data = data_of({"name": "classes", "path": str(tmp_path / "n")}, captions=TEMPLATES)
    assert any("names are numbers" in line for line in loader_of(data, 2).problems())


def test_folders_that_spell_one_class_are_one_class(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café_noir")
    tree = read_tree(Archive(put(tmp_path, f"{decomposed}/1.png", "café noir/1.png", "tea /1.png")))
    assert tree.classes == ["café noir", "tea"] and "are one class" in tree.notes[0]


def test_names_that_are_no_unicode_are_packed(tmp_path):
    root = put(tmp_path / "t", "dog/1.png")
    folder = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(encoded(picture(1)))
    assert pack(root, "--to", tmp_path / "out") == 0
    assert (tmp_path / "out" / "classnames.txt").read_text() == "caf\\udce9\ndog\n"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.png", "b.png"],
            r"its 2 images lie outside of any folder, and none has a text beside it .*--captions TABLE",
        ),
        (["00000.tar"], r"holds no images; found 1 \.tar .*train on them with \{name: shards\}"),
        (["a/x.webm"], r"holds no images; found 1 \.webm"),
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


# --- pictures that cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [b"", b"no picture at all", encoded(picture(1), "JPEG")[:200], encoded(picture(1))[:80]],
)
def test_a_picture_that_cannot_be_read_is_named_before_anything_is_written(
    tmp_path, capsys, broken
):
    root = put(tmp_path / "t", *(f"cat/{i}.png" for i in range(6)), "dog/1.png")
    put(root, "cat/3.png", data=broken)
    assert pack(root, "--to", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "image 'cat/3.png' cannot be used" in said and "nothing was written" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t"]
    assert pack(root, "--to", tmp_path / "out", "--on-missing", "skip") == 0
    said = capsys.readouterr()
    assert (
        "image 'cat/3.png' cannot be used" in said.err
        and "6 images with 0 captions and 2 classes" in said.out
    )
    assert len(packed(tmp_path / "out", **TEMPLATES)) == 6


def test_an_interrupted_pack_leaves_the_earlier_output(tmp_path, monkeypatch):
    from vlp.data.format import ShardWriter

    root = put(tmp_path / "t", "cat/1.png", "dog/1.png")
    assert pack(root, "--to", tmp_path / "out") == 0
    before = (tmp_path / "out" / "00000.tar").read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "add", interrupted)
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 128 + signal.SIGINT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t"]
    assert (tmp_path / "out" / "00000.tar").read_bytes() == before
    monkeypatch.undo()

    # Killed between its two renames: the earlier output waits under another name and comes back.
    real, calls = Path.rename, []

    def killed(path, target):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), 0)
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    assert pack(root, "--to", tmp_path / "out", "--overwrite") == 128 + signal.SIGINT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "t"] and len(calls) == 3


# --- families -------------------------------------------------------------------------------------


def test_families_stay_in_one_shard_and_in_one_part(tmp_path):
    rows = [
        {"image": f"{i}.png", "caption": f"c{i}", "origin": f"o{i % 4}" if i < 12 else None}
        for i in range(15)
    ]
    root = put(tmp_path / "p", *(row["image"] for row in rows))
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = ["--captions", tmp_path / "t.jsonl"]
    assert pack(root, *table, "--samples-per-shard", 4, "--to", tmp_path / "out") == 0
    homes: dict[str, set[str]] = {}
    for sample in packed(tmp_path / "out"):
        if sample.meta.get("origin"):
            homes.setdefault(sample.meta["origin"], set()).add(sample.key[:5])
    assert len(homes) == 4 and all(len(shards) == 1 for shards in homes.values())
    parts = []
    for part in ("1/2", "2/2"):
        out = tmp_path / part.replace("/", "of")
        if pack(root, *table, "--part", part, "--to", out) == 0:
            parts.append(packed(out))
    origins = [{sample.meta.get("origin") for sample in part} - {None} for part in parts]
    assert sum(map(len, parts)) == 15 and len(parts) == 2
    assert not origins[0] & origins[1]


# --- names in tables ------------------------------------------------------------------------------

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
