"""Folders and tars with one folder a class, and what is easily taken for one."""

from __future__ import annotations

import os
import unicodedata

import pytest

from tests.data.folder_material import TEMPLATES, both, pack, put
from tests.data.material import data_of, encoded, loader_of, picture
from vlp.data.archives import Archive
from vlp.data.trees import read_tree
from vlp.eval.datasets import open_source


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


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    root = put(tmp_path / "all", "mine/cat/1.png", "mine/dog/1.png", "other/cow/1.png") / "mine"
    (root / "up").symlink_to("..")
    archive = Archive(root)
    assert read_tree(archive).classes == ["cat", "dog"]
    assert "1 links to a folder that holds this one (up)" in str(archive.left_out)


def test_a_folder_that_only_wraps_the_tree_is_refused_with_the_one_to_name(tmp_path):
    root = put(tmp_path / "r", "Data/101/cat/1.png", "Data/101/dog/1.png")
    with pytest.raises(
        ValueError,
        match=r"one folder, 'Data/101', and below it 2 .*if those are the .*, give .*/r/Data/101",
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


def test_one_folder_beside_a_json_is_no_class(tmp_path):
    root = put(tmp_path, "images/1.png", "images/2.png")
    put(root, "llava_mix.json", data=b'[{"image": "1.png", "caption": "a dog"}]')
    with pytest.raises(ValueError, match=r"one class without captions; found llava_mix\.json"):
        read_tree(Archive(root))


def test_folders_that_spell_one_class_are_one_class(tmp_path):
    decomposed = unicodedata.normalize("NFD", "café_noir")
    tree = read_tree(Archive(put(tmp_path, f"{decomposed}/1.png", "café noir/1.png", "tea /1.png")))
    assert tree.classes == ["café noir", "tea"] and "are one class" in tree.notes[0]
    labels = [record.label for record in open_source(str(tmp_path)).records]
    assert len(labels) == 3 and len(set(labels)) == 2, "evaluation sees the same classes"


def test_classes_that_differ_in_case_stay_apart_and_are_told(tmp_path):
    tree = read_tree(Archive(put(tmp_path, "Cat/1.png", "cat/1.png", "dog/1.png")))
    assert tree.classes == ["Cat", "cat", "dog"]
    assert tree.notes == ["'Cat', 'cat' differ in case only: they stay classes apart"]


def test_names_that_are_no_unicode_are_packed(tmp_path):
    root = put(tmp_path / "t", "dog/1.png")
    folder = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(encoded(picture(1)))
    assert pack(root, "--to", tmp_path / "out") == 0
    assert (tmp_path / "out" / "classnames.txt").read_text() == "caf\\udce9\ndog\n"
