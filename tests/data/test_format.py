"""Shards: written reproducibly and whole, indexed, read by others, and theirs by us."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import pytest

from tests.data.material import REAL, encoded, needs_data, picture, write_shards, write_tar
from vlp.config import Captions
from vlp.data import digests, index_file
from vlp.data import index as index_module
from vlp.data.format import ShardWriter, index
from vlp.data.members import Picture, parse_name
from vlp.data.paths import expand
from vlp.data.rows import ROW
from vlp.data.sources.remote import Options as RemoteOptions
from vlp.data.sources.remote import open as open_remote
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

IMAGE = encoded(picture(1))


def file_digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.glob("*"))
        if p.name != "_index.bin"
    }


def test_the_same_input_gives_identical_bytes_and_other_input_does_not(tmp_path):
    one, two = (file_digests(write_shards(tmp_path / name, 25, 10)) for name in "ab")
    other = file_digests(write_shards(tmp_path / "c", 25, 10, start=1))
    assert one == two and len(one) == 6
    assert all(one[name] != other[name] for name in one if name.endswith(".tar"))


def test_layout_is_that_of_img2dataset(tmp_path):
    with ShardWriter(tmp_path, 2) as writer:
        for i in range(3):
            writer.add(None, IMAGE, "png", [f"a\ncaption {i}", "another"], {"class": "cube"}, cls=4)
    with tarfile.open(tmp_path / "00001.tar") as tar:
        assert tar.getnames() == [f"000010000.{kind}" for kind in ("png", "txt", "json", "cls")]
        assert tar.extractfile("000010000.txt").read() == b"a caption 2"
        record = json.load(tar.extractfile("000010000.json"))
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}
    assert record == {"captions": ["a\ncaption 2", "another"], "class": "cube", "key": "000010000"}
    stats = json.loads((tmp_path / "00001_stats.json").read_text())
    assert stats["count"] == stats["successes"] == 1 and stats["status_dict"] == {"success": 1}


def test_statistics_hold_a_digest_of_every_sample_which_reading_confirms(tmp_path):
    long = "k" * 120  # a name that needs a header of its own
    with ShardWriter(tmp_path, 9) as writer:
        writer.add("a/größe", IMAGE, "png", ["x"], cls=3)
        writer.add(long, IMAGE, "png", ["y"], negative_images={0: Picture(IMAGE, "png")})
        writer.add(os.fsdecode(b"l\xe4nge"), IMAGE, "png", ["z"])  # a file's name from another time
    path = tmp_path / "00000.tar"
    written = digests.beside(path)
    assert list(written) == ["a/größe", long, "l\ufffdnge"]
    record = json.dumps({"captions": ["x"], "key": "a/größe"}, ensure_ascii=False).encode()
    members = {"a/größe.png": IMAGE, "a/größe.txt": b"x", "a/größe.json": record}
    assert written["a/größe"] == digests.digest_of({**members, "a/größe.cls": b"3"})
    assert written["a/größe"] != digests.digest_of({**members, "a/größe.cls": b"4"})

    [shard] = index([path])
    assert shard.n_left_out == 0 and [shard.digest(i) for i in range(3)] == list(written.values())
    source = open_shards(Options(str(path)), Captions())
    assert [source[i].key for i in range(3)] == list(written)

    (tmp_path / "00000_stats.json").write_text('{"digests": {"crc32": {"a": 1}}}')
    assert index_module.scan(path).problems[0] == (
        "samples are not compared with what was written: "
        "00000_stats.json holds no digests (TypeError)"
    )


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_that_was_unpacked_and_packed_again_is_the_same(tmp_path, form):
    with ShardWriter(tmp_path, 9) as writer:
        for i in range(4):
            writer.add(f"part/{i}", IMAGE, "png", [f"caption {i}"], cls=i)
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as tar:
        members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]

    # As `tar -C DIR -cf FILE .` writes it, in the order of a folder; one sample was changed.
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in sorted(members, key=lambda member: member[0][::-1]):
            info = tarfile.TarInfo(f"./{name}")
            data = b"other" if name == "part/2.txt" else data
            info.size, info.mtime = len(data), 1.5
            tar.addfile(info, io.BytesIO(data))

    [shard] = index([path])
    assert shard.count == 3 and shard.n_left_out == 1
    assert shard.problems[0].startswith("part/2: altered since it was written: its members")
    source = open_shards(Options(str(path)), Captions())
    assert {source[i].captions for i in range(3)} == {(f"caption {i}",) for i in (0, 1, 3)}


def test_an_index_of_the_version_before_is_read_unchecked_where_it_is_remote(tmp_path, capsys):
    folder = write_shards(tmp_path / "shards", 20, 10)
    place = folder / "_index.bin"
    shards = index_file.parse_index(place.read_bytes()).values()
    header, body = [], b""
    for shard in shards:
        kept = ("name", "size", "mtime_ns", "count", "keys", "texts", "forms")
        header.append({**{name: getattr(shard, name) for name in kept}, "n_extents": 0})
        for offset, length, form, _, *rest in ROW.iter_unpack(shard.rows):
            body += struct.pack("<QIIBBH", offset, length, form, *rest)
    encoded_header = json.dumps(header).encode()
    content = len(encoded_header).to_bytes(8, "little") + encoded_header + body
    place.write_bytes(b"vlp shard index 3\n" + hashlib.sha256(content).digest() + content)

    with pytest.raises(index_file.OldIndex):
        index_file.parse_index(place.read_bytes())
    source = open_remote(RemoteOptions(f"file://{folder}/"), Captions())
    assert [source[i].key for i in range(20)] == [f"0000{i // 10}000{i % 10}" for i in range(20)]
    assert sum("the index of 2 shards is of an older version" in p for p in source.problems()) == 1
    assert set(source.contents().digests) == {"--------"}


def test_a_writer_that_fails_leaves_whole_shards_only(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path, 2) as writer:
        for _ in range(3):
            writer.add(None, IMAGE, "png", ["x"])
        raise RuntimeError("boom")
    assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00000_stats.json", "_index.bin"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ext": "psd"}, "image type 'psd'"),
        ({"image": b""}, "0 bytes"),
        ({"key": "../x"}, "not usable"),
        ({"key": "a.b"}, "not usable"),
        ({"key": ".a"}, "not usable"),
        ({"cls": -1}, "from 0 to 999999999"),
        ({"cls": True}, "class number"),
        ({"cls": 10**9}, "class number"),
        ({"captions": [3]}, "list of texts"),
        ({"meta": {"x": "y" * 2_000_000}}, "the JSON of"),
    ],
)
def test_the_writer_refuses_what_could_not_be_read_back(tmp_path, change, message):
    sample = {
        "key": "k",
        "image": IMAGE,
        "ext": "png",
        "captions": ["x"],
        "meta": {},
        "cls": None,
    } | change
    with ShardWriter(tmp_path, 2) as writer, pytest.raises(ValueError, match=message):
        writer.add(*sample.values())


def test_the_writer_refuses_a_repeated_key_and_a_full_folder(tmp_path):
    with ShardWriter(tmp_path, 9) as writer:
        writer.add("k", IMAGE, "png", ["x"])
        with pytest.raises(ValueError, match="twice"):
            writer.add("k", IMAGE, "png", ["x"])
    with pytest.raises(FileExistsError, match="already holds shards"):
        ShardWriter(tmp_path)


def test_the_index_knows_counts_without_reading_tars_and_follows_changes(tmp_path, monkeypatch):
    write_shards(tmp_path, 25, 10)
    paths = sorted(tmp_path.glob("*.tar"))
    monkeypatch.setattr(index_module, "scan", lambda path: pytest.fail(f"{path} was read"))
    assert [shard.count for shard in index(paths)] == [10, 10, 5]
    monkeypatch.undo()
    (tmp_path / "_index.bin").unlink()
    assert [shard.count for shard in index(paths)] == [10, 10, 5]
    write_tar(paths[1], [("a.png", IMAGE), ("a.txt", b"one"), ("b.png", IMAGE), ("b.txt", b"two")])
    assert [shard.count for shard in index(paths)] == [10, 0, 5]  # the statistics say otherwise
    (tmp_path / "00001_stats.json").unlink()
    (tmp_path / "_index.bin").unlink()
    assert [shard.count for shard in index(paths)] == [10, 2, 5]
    (tmp_path / "_index.bin").write_bytes(b"vlp shard index 1\n" + b"\xff" * 40)
    assert [shard.count for shard in index(paths)] == [10, 2, 5]


def test_an_index_that_cannot_lie_beside_its_shards_goes_to_the_cache(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards", 4, 10)
    (folder / "_index.bin").unlink()
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    real = index_module.save_index

    def refuse(path, shards):
        if path.parent == folder:
            raise PermissionError(path)
        real(path, shards)

    monkeypatch.setattr(index_module, "save_index", refuse)
    assert [s.count for s in index([folder / "00000.tar"])] == [4]
    monkeypatch.setattr(index_module, "scan", lambda path: pytest.fail("scanned again"))
    assert [s.count for s in index([folder / "00000.tar"])] == [4]
    assert (
        len(list((tmp_path / "cache" / "index").iterdir())) == 1
        and not (folder / "_index.bin").exists()
    )


def test_samples_come_back_as_written(tmp_path):
    source = open_shards(Options(str(write_shards(tmp_path, 25, 10))), Captions())
    assert len(source) == 25 and source.n_left_out == 0
    for i in (0, 9, 10, 24):
        sample = source[i]
        assert (sample.sample_id, sample.image, sample.image_type) == (
            i,
            encoded(picture(i)),
            "png",
        )
        assert (
            sample.captions == (f"caption {i} one", f"caption {i} two")
            and sample.meta["number"] == i
        )


def test_paths_may_be_folders_files_braces_and_lists(tmp_path):
    write_shards(tmp_path / "a", 25, 10)
    write_shards(tmp_path / "b", 5, 10)
    assert [p.name for p in expand(f"{tmp_path}/a/{{00002,00000}}.tar::{tmp_path}/b")] == [
        "00002.tar",
        "00000.tar",
        "00000.tar",
    ]
    assert (
        len(open_shards(Options(f"{tmp_path}/a/{{00000..00001}}.tar::{tmp_path}/b"), Captions()))
        == 25
    )
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        expand(f"{tmp_path}/a/{{00002..00003}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a folder without \.tar files"):
        expand(f"{tmp_path}/a::{tmp_path}/empty")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", ("a/b", "image", "jpg")),
        ("b.seg.PNG", ("b.seg", "image", "png")),
        ("../../x.jpg", ("x", "image", "jpg")),
        ("/etc/x.txt", ("etc/x", "txt", "txt")),
        ("./x.json", ("x", "json", "json")),
        ("a.b/c.jpg", ("a.b/c", "image", "jpg")),
        ("IMG_3.v2.negative.JPG", ("IMG_3.v2", "negative.0", "jpg")),
        ("x.negative.12.png", ("x", "negative.12", "png")),
        ("x.negative.1234.png", ("x.negative.1234", "image", "png")),
        ("x.negative.3.txt", ("x.negative.3", "txt", "txt")),
        ("negatives.png", ("negatives", "image", "png")),
        ("a\\b.TXT", ("a/b", "txt", "txt")),
        ("x.npy", ("x", "", "npy")),
        ("noext", ("noext", "", "")),
        ("folder/", None),
        ("._x.jpg", None),
        ("__MACOSX/x.jpg", None),
        ("a/.cache/x.jpg", None),
        ("PaxHeaders.7/x.jpg", None),
    ],
)
def test_names_are_taken_apart_and_stay_inside(name, expected):
    assert parse_name(name) == expected


def test_webdataset_reads_our_shards_and_we_read_theirs(tmp_path):
    import webdataset

    write_shards(tmp_path / "ours", 7, 4)
    urls = [str(path) for path in sorted((tmp_path / "ours").glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["txt"] for s in theirs] == [f"caption {i} one".encode() for i in range(7)]
    assert [s["png"] for s in theirs] == [encoded(picture(i)) for i in range(7)]

    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as sink:
        for i in range(5):
            sink.write(
                {
                    "__key__": f"deep/{'long' * 40}/s{i}",
                    "png": IMAGE,
                    "txt": f"text {i}",
                    "cls": i,
                    "json": {"class": "c"},
                }
            )
    source = open_shards(Options(str(tmp_path / "theirs.tar")), Captions())
    assert [source[i].captions for i in range(5)] == [(f"text {i}",) for i in range(5)]
    assert source[3].key == f"deep/{'long' * 40}/s3" and source[3].meta == {"class": "c", "cls": 3}


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_kind_of_tar_header_is_understood(tmp_path, layout):
    names = ["plain", "größe/ü", "d" * 60 + "/" + "f" * 70] + (
        ["e" * 150] if layout != tarfile.USTAR_FORMAT else []
    )
    with tarfile.open(tmp_path / "x.tar", "w", format=layout) as tar:
        for name in names:
            for kind, data in (("png", IMAGE), ("txt", name.encode())):
                (tmp_path / "member").write_bytes(data)
                tar.add(tmp_path / "member", f"{name}.{kind}")  # real owners, times and modes
    source = open_shards(Options(str(tmp_path / "x.tar")), Captions())
    assert (
        [source[i].key for i in range(len(source))]
        == names
        == [source[i].captions[0] for i in range(len(source))]
    )


@needs_data
def test_real_tars_are_understood(tmp_path):
    shard = index_module.scan(REAL / "coco_open.tar")
    assert (shard.count, shard.n_problems) == (111, 0)


def test_a_copy_with_its_times_is_compared_and_not_read_again(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", 120, 60)
    paths = sorted(shards.glob("*.tar"))
    known = index(paths)
    for path in paths:
        path.chmod(0o600)  # the inode's time of change is another, as after `cp -a`
    scanned = []
    scan = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda path: scanned.append(path.name) or scan(path))

    assert [shard.rows for shard in index(paths)] == [shard.rows for shard in known]
    assert scanned == []

    # Every caption of the second is another one, at equal size and time of modification.
    status = paths[1].stat()
    paths[1].write_bytes(paths[1].read_bytes().replace(b"caption", b"sentenc"))
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    index(paths)
    assert scanned == [paths[1].name]
