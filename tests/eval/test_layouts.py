"""Evaluation sets as folders and tars without a table: read as `vlp data pack` and training read
them."""

import json
import shutil

import pytest

from tests.eval import material
from vlp.eval.datasets import open_source
from vlp.eval.pictures import Collection, DataError
from vlp.eval.tasks import retrieval


def put(root, *names, data=None):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(material.png(material.picture(i)) if data is None else data)
    return root


def as_tar(root, tar):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    material.write_tar(
        tar, [(path.relative_to(root).as_posix(), path.read_bytes()) for path in files]
    )
    return tar


def test_img2datasets_files_are_read_for_retrieval_and_are_no_classes(tmp_path):
    root = tmp_path / "files"
    names = [f"0000{i // 2}/0000{i // 2}{i:04d}" for i in range(4)]
    put(root, *(f"{name}.png" for name in names))
    for i, name in enumerate(names):
        put(root, f"{name}.txt", data=f"caption {i}".encode())
        put(root, f"{name}.json", data=json.dumps({"caption": f"caption {i}", "url": "x"}).encode())
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"url": ["x"], "caption": ["y"], "key": ["0"]}), root / "00000.parquet")
    put(root, "00000_stats.json", data=b"{}")
    n_cases = 0
    for data in (root, as_tar(root, tmp_path / "files.tar")):
        source = retrieval.read(retrieval.Options(str(data)))
        assert [record.captions for record in source.records] == [
            (f"caption {i}",) for i in range(4)
        ]
        assert [record.label for record in source.records] == [None] * 4
        n_cases += 1
    assert n_cases == 2
    put(root, "00001/silent.png")
    with pytest.raises(
        DataError, match=r"'00001/silent.png' has no text beside it(.|\n)*missing=skip"
    ):
        open_source(str(root))
    assert len(open_source(str(root), missing="skip").skipped) == 1


def test_hidden_names_are_no_classes_and_links_are(tmp_path):
    root = put(
        tmp_path / "t",
        "cat/1.png",
        ".ipynb_checkpoints/1.png",
        "__MACOSX/cat/._1.png",
        "cat/._1.png",
    )
    (root / "dog").symlink_to(put(tmp_path / "store", "x/2.png") / "x")
    (root / "dog" / "loop").symlink_to(root)
    source = open_source(str(root))
    assert [record.label for record in source.records] == ["cat", "dog"]


def test_an_empty_class_folder_is_refused_unless_skipped(tmp_path):
    root = put(put(tmp_path, "cat/1.png", "dog/1.png"), "cow/1.webm", data=b"x")
    with pytest.raises(DataError, match=r"'cow' holds no image \(found 1 \.webm\)"):
        open_source(str(root))
    source = open_source(str(root), missing="skip")
    assert ([r.label for r in source.records], len(source.skipped)) == (["cat", "dog"], 1)


def test_shards_and_class_folders_in_one_folder_are_refused(tmp_path):
    root = put(tmp_path / "t", "cat/1.png", "dog/1.png")
    material.write_tar(
        root / "all.tar", [("0.png", material.png(material.picture(0))), ("0.txt", b"x")]
    )
    with pytest.raises(
        DataError,
        match=r"holds shards \(all\.tar\) and images in folders \(cat/1\.png\); give one of them",
    ):
        open_source(str(root))
    assert len(open_source(str(root / "all.tar")).records) == 1
    # A folder of the split's name decides; a file that a Mac left behind is no shard.
    put(root, "test/cat/1.png", "test/dog/1.png")
    assert [r.label for r in open_source(str(root)).records] == ["cat", "dog"]
    (root / "all.tar").rename(root / "._all.tar")
    assert len(open_source(str(root / "test"), split="val").records) == 2


def test_files_are_of_the_split_that_their_names_tell(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = {"train": [0, 1, 2], "test": [3, 4]}
    for split, numbers in pictures.items():
        data = [material.png(material.picture(i)) for i in numbers]
        members = []
        for i, image in zip(numbers, data):
            members += [(f"{i}.png", image), (f"{i}.txt", f"caption {i}".encode())]
        (tmp_path / "tars").mkdir(exist_ok=True)
        material.write_tar(tmp_path / "tars" / f"{split}-00000.tar", members)
        (tmp_path / "hub").mkdir(exist_ok=True)
        rows = {
            "image": [{"bytes": image, "path": None} for image in data],
            "caption": [f"caption {i}" for i in numbers],
        }
        pq.write_table(pa.table(rows), tmp_path / "hub" / f"{split}-00000-of-00001.parquet")

    (tmp_path / "above").mkdir()
    shutil.copytree(tmp_path / "hub", tmp_path / "above" / "data")
    n_cases = 0
    for kind in ("tars", "hub"):
        root = tmp_path / kind
        for split, numbers in pictures.items():
            captions = [record.captions for record in open_source(str(root), split=split).records]
            assert captions == [(f"caption {i}",) for i in numbers]
            n_cases += 1
        with pytest.raises(DataError, match="has no split 'val', only test, train; pass split="):
            open_source(str(root), split="val")
    with pytest.raises(DataError, match="has no split 'val', only test, train"):
        open_source(str(tmp_path / "above"), split="val")
    assert n_cases == 4
    assert len(open_source(str(tmp_path / "tars" / "train-00000.tar")).records) == 3


def test_samples_of_shards_that_cannot_be_used_may_be_skipped(tmp_path):
    members = []
    for i in range(4):
        members += [(f"{i}.png", material.png(material.picture(i))), (f"{i}.txt", b"a caption")]
    members.append(("00000_stats.json", b"{}"))  # img2dataset's own, no sample
    material.write_tar(tmp_path / "whole.tar", members)
    assert len(open_source(str(tmp_path / "whole.tar")).records) == 4
    material.write_tar(tmp_path / "lost.tar", members[1:])
    with pytest.raises(DataError, match=r"0: no image member(.|\n)*missing=skip"):
        open_source(str(tmp_path / "lost.tar"))
    source = open_source(str(tmp_path / "lost.tar"), missing="skip")
    assert (len(source.records), len(source.skipped)) == (3, 1)


def test_messages_say_what_vlp_eval_takes(tmp_path):
    root = put(tmp_path / "t", "in/cat/1.png", "in/dog/1.png")
    with pytest.raises(DataError, match=r"vlp eval: split=in\)"):
        open_source(str(as_tar(root, tmp_path / "t.tar")))
    (tmp_path / "t.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    with pytest.raises(DataError, match="is compressed with gzip"):
        open_source(str(tmp_path / "t.tar.gz"))
    with pytest.raises(DataError, match=r"none of the 2 images .*name it: --data TABLE"):
        retrieval.read(retrieval.Options(str(root / "in"), missing="skip"))


def test_a_tar_of_class_folders_is_read_as_the_folder_is(tmp_path):
    root = put(tmp_path / "t", "test/cat/1.png", "test/dog/1.png", "train/cat/2.png")
    read = [open_source(str(data)) for data in (root, as_tar(root, tmp_path / "t.tar"))]
    assert [[r.label for r in source.records] for source in read] == [["cat", "dog"]] * 2
    with pytest.raises(DataError, match="no split 'val', only test, train"):
        open_source(str(tmp_path / "t.tar"), split="val")


def test_annotations_find_pictures_as_tables_do(tmp_path):
    found = Collection(put(tmp_path / "photos", "a/p10.png", "b/q.PNG", "val/1.png"))
    for name, stored in (
        ("a\\p10.png", "a/p10.png"),
        ("P10", "a/p10.png"),
        ("b/q.png", "b/q.PNG"),
        ("x/1.png", "val/1.png"),
    ):
        assert found.find(name).path.endswith(stored), name
    with pytest.raises(
        DataError, match=r"name 'x/1\.png' and 'val/1\.png', and .* holds 'val/1\.png' only"
    ):
        found.find("val/1.png")
