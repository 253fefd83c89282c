"""Which members of a tar are one sample: dotted keys, any order, what is passed over, files that
are no plain tars.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import os
import random
import struct
import tarfile
import time

import pytest

from tests.data.material import encoded, picture, write_shards, write_tar
from tests.data_tools.tools import call, read
from vlp.config import Captions
from vlp.data import index_file
from vlp.data.index import index
from vlp.data.index_file import parse_index
from vlp.data.paths import expand
from vlp.data.scan import scan
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards
from vlp.data_tools import inspect, reshard, validate
from vlp.eval.datasets import open_source
from vlp.eval.pictures import DataError

IMAGE, OTHER = encoded(picture(1)), encoded(picture(2))
NAMES = {
    "plain": "{i:03d}",
    "dotted": "IMG_{i}.v2",
    "upper": "{i:03d}",
    "deep": "a.b/{i:03d}.x.y",
    "windows": "dir\\{i}",
}


def pairs(
    pattern: str, n: int = 6, image: str = "png", text: str = "txt"
) -> list[list[tuple[str, bytes]]]:
    """The members of n samples, image i with the text i."""
    keys = [pattern.format(i=i) for i in range(n)]
    return [
        [(f"{key}.{image}", encoded(picture(i))), (f"{key}.{text}", b"text %d" % i)]
        for i, key in enumerate(keys)
    ]


ORDERS = {
    "together": lambda samples: [member for sample in samples for member in sample],
    "text first": lambda samples: [member for sample in samples for member in reversed(sample)],
    "pictures first": lambda samples: [sample[i] for i in (0, 1) for sample in samples],
    "pictures first, texts backwards": lambda samples: (
        [s[0] for s in samples] + [s[1] for s in reversed(samples)]
    ),
    "some apart": lambda samples: [
        *samples[0],
        *samples[1][:1],
        *samples[2],
        *samples[1][1:],
        *itertools.chain(*samples[3:]),
    ],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("naming", NAMES)
def test_samples_are_found_under_any_name_and_in_any_order(tmp_path, naming, order):
    samples = pairs(NAMES[naming], image="PNG" if naming == "upper" else "png")
    path = write_tar(
        tmp_path / "0.tar", [("./" + name, data) for name, data in ORDERS[order](samples)]
    )
    source = open_shards(Options(str(path)), Captions())
    assert len(source) == 6 and source.n_left_out == 0 and not source.problems()
    seen = {source[i].captions[0]: source[i].image for i in range(6)}
    assert seen == {f"text {i}": encoded(picture(i)) for i in range(6)}
    evaluated = open_source(str(path)).records
    assert {record.captions[0]: record.picture.read() for record in evaluated} == seen


def test_a_dotted_member_belongs_to_a_sample_or_is_one(tmp_path):
    """x.seg.png is webdataset's member seg.png of x; IMG.v2.png with a text of its own is a sample;
    wherever they stand.
    """
    host = [("x.png", IMAGE), ("x.txt", b"host")]
    guests = [("x.seg.png", OTHER), ("x.meta.json", b"{}"), ("x.depth.npy", b"1")]
    own = [("x.v2.png", OTHER), ("x.v2.txt", b"own"), ("y.v1.png", OTHER)]
    n_orders = 0
    between = host[:1] + guests + host[1:] + own, host[:1] + own + guests + host[1:]
    for members in (host + guests + own, guests + own + host, *between):
        shard = scan(write_tar(tmp_path / f"{n_orders}.tar", members))
        assert shard.left_out == {
            "members .seg.png": 1,
            "members .meta.json": 1,
            "members .npy": 1,
        }, members
        with open(tmp_path / f"{n_orders}.tar", "rb") as file:
            found = {
                s.key: (s.image, s.captions)
                for s in (shard.sample(file, i) for i in range(shard.count))
            }
        assert found == {"x": (IMAGE, ("host",)), "x.v2": (OTHER, ("own",)), "y.v1": (OTHER, ())}, (
            members
        )
        n_orders += 1
    assert n_orders == 4


def test_every_member_that_nobody_reads_is_counted_and_told(tmp_path, capsys):
    members = ORDERS["together"](pairs("{i}"))
    members += [(f"{i}.webm", b"film") for i in range(3)] + [
        ("1.npy", b""),
        ("README", b"x"),
        ("0.jpg", OTHER),
    ]
    members += [
        ("._0.png", b"apple"),
        ("__MACOSX/0.png", b"apple"),
        (".DS_Store", b""),
        ("7.png", IMAGE),
        ("8.txt", b"alone"),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"l{kind.decode()}.png")
            info.type, info.linkname, info.size = kind, "0.png", 0
            tar.addfile(info)
    expected = {
        "members .webm": 3,
        "members .npy": 1,
        "members without an extension": 1,
        "hidden files": 3,
        "links (tar --dereference stores the files)": 1,
        "links (tar --hard-dereference stores the files)": 1,
        "devices": 1,
        "folders": 1,
        "no image member": 1,
        "a second sample of this key": 1,
    }
    assert scan(path).left_out == expected
    source = open_shards(Options(str(path)), Captions(missing="drop"))
    assert (
        len(source) == 6
        and "3 × members .webm" in source.problems()[0]
        and "1 × no image member" in source.problems()[0]
    )
    assert call(inspect, path) == 0 and call(validate, path) == 1
    said = capsys.readouterr().out
    assert said.count("members .webm") >= 2 and "samples with text in  txt 6" in said


def test_a_set_without_a_good_sample_is_no_success(tmp_path, capsys):
    path = write_tar(tmp_path / "0.tar", [("a.webm", b"1"), ("b.npy", b"2")])
    assert call(validate, path) == 1
    assert "no good sample" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"0\.tar holds no usable sample: .*1 × members \.npy, 1 × members \.webm"
    ):
        open_shards(Options(str(path)), Captions())


def packed(path, data: bytes):
    kinds = {
        ".gz": gzip.compress,
        ".tgz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
        ".tar": gzip.compress,
    }
    if path.suffix == ".zst":
        import pyarrow

        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(data)
    else:
        path.write_bytes(kinds[path.suffix](data))
    return path


@pytest.mark.parametrize(
    "name", ["0.tar.gz", "0.tgz", "0.tar.zst", "0.tar.bz2", "0.tar.xz", "0.tar"]
)
def test_compressed_tars_are_named_and_resharded(tmp_path, name):
    data = write_tar(
        tmp_path / "plain" / "0.tar", ORDERS["pictures first"](pairs("{i}"))
    ).read_bytes()
    (tmp_path / "in").mkdir()
    path = packed(tmp_path / "in" / name, data)
    for place in (path, tmp_path / "in"):
        with pytest.raises(ValueError, match=r"is compressed .*vlp data reshard"):
            open_shards(Options(str(place)), Captions())
    with pytest.raises(DataError, match=r"is compressed .*vlp data reshard"):
        open_source(str(tmp_path / "in"))
    call(reshard, tmp_path / "in", "--to", tmp_path / "out")
    assert {s.captions: s.image for s in read(tmp_path / "out").values()} == {
        (f"text {i}",): encoded(picture(i)) for i in range(6)
    }
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == []
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ValueError, match="cannot be unpacked to its end"):
        call(reshard, tmp_path / "in", "--to", tmp_path / "again")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"PK\x03\x04", "zip archive; unpack it"),
        (b"version https://git-lfs.github.com", "git lfs pull"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"", "an empty file"),
        (b"\x07" * 900, "a damaged header"),
    ],
)
def test_what_is_no_tar_is_called_by_its_name(tmp_path, head, said, capsys):
    path = tmp_path / "0.tar"
    path.write_bytes(head and head + bytes(600))
    with pytest.raises(ValueError, match=f"holds no usable sample: .*{said}"):
        open_shards(Options(str(path)), Captions())
    assert call(validate, path) == 1 and said in capsys.readouterr().out


def test_folders_and_files_that_cannot_be_read_say_what_to_do(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path / "s", 4, 2)
    (tmp_path / "s" / "00007.tar").mkdir()
    with pytest.raises(ValueError, match=r"00007\.tar is a folder, not a tar"):
        open_shards(Options(str(tmp_path / "s")), Captions())
    assert call(validate, tmp_path / "s") == 1
    said = capsys.readouterr().out
    assert "00007.tar is a folder" in said and "3 shards, 4 good samples, 1 problems" in said
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error")):
        with monkeypatch.context() as patch:
            patch.setattr(
                "builtins.open", lambda *_, error=error, **__: (_ for _ in ()).throw(error)
            )
            with pytest.raises(ValueError, match=rf"00000\.tar cannot be read: {error.strerror}"):
                scan(tmp_path / "s" / "00000.tar")
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda _, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(ValueError, match=rf"s cannot be read: {error.strerror}"):
                expand(str(tmp_path / "s"))


def test_a_path_that_names_no_shards_says_what_is_there(tmp_path):
    write_shards(tmp_path / "a" / "b", 4, 2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.jpg").touch()
    assert [p.name for p in expand(f"{tmp_path}/*/b/*.tar")] == ["00000.tar", "00001.tar"]
    wrong = {
        "a": "some in its folders b",
        "c": r"holds 1 \.jpg",
        "c/0.tar": "but no 0.tar in it",
        "z/0.tar": "only",
    }
    for path, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            expand(f"{tmp_path}/{path}")
    (tmp_path / "a" / "b" / "00001.tar.gz").touch()  # beside its plain tar
    assert len(expand(f"{tmp_path}/a/b")) == 2


@pytest.mark.parametrize("padding", [True, False])
def test_joined_tars_are_read_to_the_end(tmp_path, padding):
    parts = [write_tar(tmp_path / f"{i}.tar", pairs("{i}")[i]).read_bytes() for i in range(3)]
    if not padding:  # as Go and libarchive end a tar
        parts = [
            part.rstrip(b"\0") + bytes(-len(part.rstrip(b"\0")) % 512 + 1024) for part in parts
        ]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    shard = scan(tmp_path / "all.tar")
    assert (shard.count, shard.n_left_out) == (
        3,
        0,
    ) and "several tars joined in one" in shard.problems[0]
    assert len(open_source(str(tmp_path / "all.tar")).records) == 3


def test_a_folder_of_several_splits_is_not_trained_on_as_one(tmp_path):
    for number, name in enumerate(("train-0.tar", "train-1.tar", "test-0.tar")):
        samples = pairs(f"{number}_{{i}}", 3)
        write_tar(tmp_path / name, ORDERS["together"](samples))
    with pytest.raises(
        ValueError,
        match=r"several splits: test, train; name one .*/train\*\.tar, or all: .*/\*\.tar",
    ):
        open_shards(Options(str(tmp_path)), Captions())
    for pattern, n_samples in (("train*.tar", 6), ("*.tar", 9)):
        assert len(open_shards(Options(f"{tmp_path}/{pattern}"), Captions())) == n_samples


def test_a_hole_costs_its_neighbours_and_not_the_rest(tmp_path):
    whole = write_tar(tmp_path / "w.tar", ORDERS["together"](pairs("{i:02d}", 20))).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        starts = [member.offset for member in tar.getmembers()]
    n_tried = 0
    for n in range(2, 38, 5):
        path = tmp_path / "h.tar"
        path.write_bytes(whole[: starts[n]] + bytes(512) + whole[starts[n] + 512 :])
        shard = scan(path)
        assert 18 <= shard.count <= 19 and shard.n_damaged == 1 and shard.n_left_out >= 1
        with pytest.raises(DataError, match="zeros where a header should be"):
            open_source(str(path))
        n_tried += 1
    assert n_tried == 8


def test_numbers_in_extended_headers_neither_hang_nor_cost_quadratic_time(tmp_path):
    def extended(records: bytes) -> bytes:
        info = tarfile.TarInfo("pax")
        info.type, info.size = tarfile.XHDTYPE, len(records)
        return info.tobuf() + records + bytes(-len(records) % 512)

    plain = write_tar(tmp_path / "p.tar", pairs("{i}")[0]).read_bytes()
    started = time.process_time()
    sizes = (b"-1536", b"-2048", b"-4096", b"-1", b"99999999999999999999", b"1e3")
    for value in sizes:
        record = b"size=" + value + b"\n"
        record = b"%d %s" % (len(record) + 3, record)
        (tmp_path / "x.tar").write_bytes(extended(record) + plain)
        assert scan(tmp_path / "x.tar").n_damaged >= 1
    (tmp_path / "y.tar").write_bytes(extended(b"5 a=\n" * 200_000) + plain)
    assert scan(tmp_path / "y.tar").count == 1
    assert len(sizes) == 6 and time.process_time() - started < 3


def test_an_index_with_one_wrong_byte_is_made_anew(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", ORDERS["pictures first"](pairs("{i}")))
    [shard] = index([tmp_path / "0.tar"])
    whole = (tmp_path / "_index.bin").read_bytes()
    assert parse_index(whole) == {"0.tar": shard} and shard.extents
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0x40
        with pytest.raises(ValueError):
            parse_index(bytes(damaged))
    (tmp_path / "_index.bin").write_bytes(whole[:-3])
    assert (
        index([tmp_path / "0.tar"]) == [shard] and (tmp_path / "_index.bin").read_bytes() == whole
    )
    assert "not a usable index" in capsys.readouterr().err


@pytest.mark.parametrize(
    "header",
    [
        "5",
        '[{"count": 1}]',
        "[5]",
        '[{"name": "0.tar"}]',
        '[{"count": -1, "n_extents": 1e400}]',
        "[",
        "[" * 100_000,
    ],
)
def test_a_forged_index_is_no_index(header):
    content = struct.pack("<Q", len(header)) + header.encode()
    with pytest.raises(ValueError):
        parse_index(index_file._MAGIC + hashlib.sha256(content).digest() + content)


def test_a_resumed_run_notices_other_texts_of_the_same_length(tmp_path):
    members = ORDERS["together"](pairs("{i}"))
    prints = set()
    for i, text in enumerate((b"text 0", b"texd 0", b"text 0")):
        path = write_tar(
            tmp_path / str(i) / "0.tar", [(n, text if n == "0.txt" else d) for n, d in members]
        )
        os.utime(path, (1, 1))
        prints.add(open_shards(Options(str(path)), Captions()).fingerprint())
    assert len(prints) == 2


def test_no_order_of_the_members_changes_what_is_found(tmp_path):
    """Random members of keys that may be each other's guests, sorted by name and shuffled."""
    chance, n_compared, n_samples = random.Random(5), 0, 0
    kinds = {"jpg": 0.85, "txt": 0.7, "json": 0.5, "negative.png": 0.2, "npy": 0.3}
    for _ in range(80):
        keys = chance.sample(
            ["a", "a.b", "a.b.c", "b", "d/a", "d/a.x", "c.v1", "c.v2", "c"], chance.randrange(1, 7)
        )
        names = [
            f"{key}.{kind}"
            for key, kind in itertools.product(keys, kinds)
            if chance.random() < kinds[kind]
        ]
        members = sorted(
            (name, b"{}" if name.endswith("json") else name.encode()) for name in names
        )
        found = []
        for order in (members, chance.sample(members, len(members)), members[::-1]):
            shard = scan(write_tar(tmp_path / "0.tar", order))
            with open(tmp_path / "0.tar", "rb") as file:
                samples = [shard.sample(file, i) for i in range(shard.count)]
            found.append(
                (
                    {s.key: (s.image, s.captions, s.negative_images) for s in samples},
                    shard.left_out,
                    shard.n_left_out,
                )
            )
            n_samples += shard.count
        assert found[0] == found[1] == found[2], members
        n_compared += 1
    assert n_compared == 80 and n_samples > 300


def test_a_stray_text_does_not_make_a_tar_be_held_in_memory(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("gathered")

    members = [*ORDERS["together"](pairs("{i}")), ("README.txt", b"about")]
    monkeypatch.setattr("vlp.data.scan.gathered", refuse)
    assert scan(write_tar(tmp_path / "0.tar", members)).count == 6

    # Nor does it where the picture that it may belong to has a text.
    members = [*members, ("A.png", IMAGE), ("A.txt", b"own"), ("a.txt", b"other")]
    assert scan(write_tar(tmp_path / "1.tar", members)).count == 7
    with pytest.raises(AssertionError, match="gathered"):
        scan(write_tar(tmp_path / "2.tar", [*members, ("B.png", IMAGE), ("b.txt", b"its")]))


def test_a_sparse_file_with_a_long_map_costs_no_neighbour(tmp_path):
    """GNU's older format: blocks of the map between the header and the data, which are counted in
    no size.
    """
    info = tarfile.TarInfo("hole.bin")
    info.type, info.size = b"S", 1024
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    whole = write_tar(tmp_path / "0.tar", pairs("{i}")[0]).read_bytes()
    sparse = bytes(header) + maps + b"x" * 1024
    (tmp_path / "2.tar").write_bytes(sparse + whole)
    shard = scan(tmp_path / "2.tar")
    assert shard.count == 1 and shard.left_out == {"sparse files": 1} and not shard.problems
