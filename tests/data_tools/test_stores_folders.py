"""`vlp data pack` of folders of pictures in a store: the shards that a folder here becomes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.folder_material import pack, put
from tests.data.loopback_store import Store
from tests.data.material import encoded, picture
from tests.data_tools.in_stores import content, forget_all, vlp
from tests.data_tools.test_stores import walk
from vlp.data.captions import MAX_TEXT_BYTES

SECRET = "AKIA-very-secret"


def pairs(root: Path) -> list[Any]:
    """Texts beside pictures in every way, and what is no part of a pair."""
    put(root, "a b/ü 1.png", "a b/2.JPG", "3.v2.png", "images/4.png", "images/5.png", "alone.png")
    put(root, "a b/ü 1.txt", data=b"ein Text")
    put(root, "a b/2.json", data=b'{"caption": "two", "width": 40, "height": 36}')
    put(root, "3.v2.png.txt", data=b"three\nlines")
    put(root, "texts/4.txt", "texts/5.txt", data=b"in another folder")
    put(root, "empty.png", "broken.png", data=b"")
    put(root, "broken.png", data=b"no picture")
    put(root, "empty.txt", "broken.txt", "long.txt", data=b"a text")
    put(root, "long.png")
    put(root, "long.txt", data=b"x" * (MAX_TEXT_BYTES + 9))
    put(root, ".hidden/a.png", ".hidden/b.png", "a b/.DS_Store", "clip.webm", "Thumbs.db")
    return ["--on-missing", "skip"]


def small(root: Path) -> list[Any]:
    put(root, "shrunk/1.png", "shrunk/2.png", "shrunk/3.png")
    for i in (1, 2, 3):
        record = {"caption": f"{i}", "width": 40, "height": 36, "origin": f"o{i // 2}"}
        put(root, f"shrunk/{i}.json", data=json.dumps(record).encode())
    return ["--max-side", 20, "--samples-per-shard", 2]


def classes(root: Path) -> list[Any]:
    put(root, "set/cat/1.png", "set/cat/more/2.png", "set/dog/1.png", "set/.trash/1.png")
    put(root, "set/odd/notes.webm", data=b"w")
    return ["--split-folder", "set", "--on-missing", "skip", "--layout", "clip_benchmark"]


def fetched(root: Path) -> list[Any]:
    """As img2dataset's `files` without texts, and its tables."""
    keys = [f"00000000{i}" for i in range(3)]
    put(root, *(f"00000/{key}.png" for key in keys))
    rows = [
        {"key": key, "url": "u", "status": "success", "caption": key, "similarity": 0.5}
        for key in keys
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "00000.parquet")
    return []


SLOW = [pytest.param(write, marks=pytest.mark.slow) for write in (small, classes, fetched)]


@pytest.mark.parametrize("write", [pairs, *SLOW])
def test_a_folder_of_a_store_gives_what_one_of_this_machine_gives(
    server: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Any,
) -> None:
    here = server.root / "photos"
    options = [*write(here), "--to"]
    assert pack(here, *options, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    whole = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    assert pack("s3://bucket/photos/", *options, tmp_path / "out") == 0
    assert content(tmp_path / "out") == whole and len(whole) > 2
    there = capsys.readouterr().out.replace("s3://bucket/photos", str(here))
    assert there == printed

    # However often a picture is read.
    names = [name for name in server.served if name.startswith("photos/")]
    assert {server.served[name] for name in names} == {1} and len(names) > 2

    forget_all(monkeypatch)
    assert pack("s3://bucket/photos", *options, "s3://bucket/out") == 0
    assert content(server.root / "out") == whole
    assert not list((tmp_path / "cache" / "packs").glob("*"))


def test_what_is_no_folder_of_pictures_is_refused(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(server.root, "photos/1.png")
    put(server.root, "photos/rows.csv", "texts/1.txt", data=b"a text")
    trials = {
        "s3://bucket/nothing": "s3://bucket/nothing is neither a file nor a folder with files",
        "s3://bucket/photos/1.png": "is one picture; name the folder that holds it",
        "s3://bucket/photos/rows.csv": "is a table; name the folder or tar of its images",
        "s3://bucket/texts": "s3://bucket/texts holds no images; found 1 .txt",
        f"{server.url}/photos": "http cannot list what is in a folder; name a tar",
    }
    for source, message in trials.items():
        assert pack(source, "--to", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert len(trials) == 5 and not list((tmp_path / "cache" / "packs").glob("*"))


def test_an_unusable_picture_is_named_and_nothing_is_written(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(server.root, "photos/1.png", "photos/2.png")
    put(server.root, "photos/1.txt", "photos/2.txt", data=b"a text")
    put(server.root, "photos/2.png", data=b"no picture")
    assert pack("s3://bucket/photos", "--to", "s3://bucket/out") == 1
    told = capsys.readouterr().err
    assert "image '2.png' cannot be used: " in told and "--on-missing skip leaves them" in told
    assert not [path for path in (server.root / "out").rglob("*") if path.is_file()]
    assert str(tmp_path) not in told, told


@pytest.mark.slow
def test_requests_for_pictures_may_fail(server: Store, tmp_path: Path) -> None:
    """Each in turn, in four ways; in half of the turns for longer than anybody tries."""
    put(server.root, "photos/1.png", "photos/2.png", "photos/3.png")
    put(server.root, *(f"photos/{i}.txt" for i in (1, 2, 3)), data=b"a text")
    assert pack(server.root / "photos", "--to", tmp_path / "here") == 0
    call = ("pack", "s3://bucket/photos", "--to")
    faults = [["error"], ["drop"], ["late"], ["cut"]]
    assert walk(server, call, content(tmp_path / "here"), faults, 2, stride=3) > 1


@pytest.mark.slow
def test_a_stopped_pack_fetches_only_what_it_lacks(
    server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And begins anew where a picture has changed meanwhile."""
    names = [f"photos/{i:02}.png" for i in range(12)]
    put(server.root, *names)
    put(server.root, *(f"photos/{i:02}.txt" for i in range(12)), data=b"a text")
    server.refused_from = 22
    assert pack("s3://bucket/photos", "--to", tmp_path / "out") == 1
    server.refused_from = None
    n_before = sum(server.served[name] for name in names)
    assert 0 < n_before < 12

    forget_all(monkeypatch)
    assert pack("s3://bucket/photos", "--to", tmp_path / "out") == 0
    assert sum(server.served[name] for name in names) == 12

    put(server.root, "photos/00.png", data=encoded(picture(77)))
    forget_all(monkeypatch)
    assert pack("s3://bucket/photos", "--to", tmp_path / "out", "--overwrite") == 0
    assert pack(server.root / "photos", "--to", tmp_path / "here") == 0
    assert content(tmp_path / "out") == content(tmp_path / "here")


@pytest.mark.slow
def test_credentials_stand_nowhere(
    server: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    put(server.root, "photos/1.png", "photos/2.png")
    put(server.root, "photos/1.txt", "photos/2.txt", data=b"a text")
    server.faulty = dict.fromkeys(range(3, 400), "error")
    secret = ["--storage", f"s3:secret={SECRET}"]
    status = vlp("pack", "s3://bucket/photos", "--to", tmp_path / "out", *secret)
    assert status == 1
    server.faulty = {}
    forget_all(monkeypatch)
    assert vlp("pack", "s3://bucket/photos", "--to", tmp_path / "out", *secret) == 0

    told = capfd.readouterr()
    assert SECRET not in told.out + told.err and "cannot be" in told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if SECRET.encode() in path.read_bytes()]
