"""What of stores cannot be read or written: credentials, buckets, addresses; other kinds."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
import s3fs

from tests.data.loopback_store import Store
from tests.data.material import encoded, picture, write_tar
from tests.data.plain_store import Plain
from tests.data_tools.in_stores import (
    FILTER,
    content,
    forget_all,
    local,
    vlp,
)
from tests.loopback_hub import TOKEN, loopback_hub
from vlp.cli import main
from vlp.data import stored, stores
from vlp.data.archives import Place
from vlp.data.paths import expand
from vlp.data_tools.pack.chunks import Check, Chunk, Source
from vlp.data_tools.pack.pictures import Pictures
from vlp.files import write_atomically

# ---- what is refused


def test_credentials_that_end_in_mid_run_lose_nothing(server, tmp_path, monkeypatch, capsys):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out")
    forget_all(monkeypatch)
    server.requests.clear()
    assert vlp(*call[:-1], "s3://bucket/dry") == 0
    marks = [i for i, one in enumerate(server.requests) if "PUT" in one and "captions.json" in one]
    forget_all(monkeypatch)
    server.requests.clear()
    server.refused_from = marks[-1] + 1
    assert vlp(*call) == 1
    said = capsys.readouterr().err
    assert (
        "look at the credentials: they may have ended" in said and "the same command goes" in said
    )
    n_marks = len(list((server.root / "out").glob("*_captions.json")))
    assert n_marks == 3

    server.refused_from = None
    before = len(server.requests)
    assert vlp(*call) == 0 and content(server.root / "out") == here
    assert not [one for one in server.requests[before:] if "PUT" in one and "_captions" in one]


REFUSED = {
    "no right to write": ("s3://bucket/out", "does not let s3://bucket/out"),
    "no bucket": ("s3://nowhere/out", "no such bucket"),
    "http": ("https://host/out", "http can be read from, but not written to"),
    "memory": ("memory://out", "each process has a memory of its own"),
    "no package": ("gs://bucket/out", "gs:// needs another package: pip install 'vlp[gs]'"),
    "no such scheme": ("s4://bucket/out", "no store is known by s4://"),
    "a bucket": ("s3://bucket", "is a whole bucket; name what is to be in it"),
    "the input": ("s3://bucket/in", "holds the input; name another folder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_to_is_refused_before_anything_is_read(
    name, server, capsys, monkeypatch
):
    to, message = REFUSED[name]
    if name == "no package":
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    server.read_only = name == "no right to write"
    assert vlp("stats", "s3://bucket/in", "--to", to) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not [request for request in server.requests if "GET /bucket/in/0" in request]


SOURCES = {
    "s3://bucket/none": "names neither a file nor a folder with files",
    "s3://bucket/in/00009.tar": "names neither a file nor a folder with files",
    "memory://in": "each process has a memory of its own",
    "s3://bucket": "is a folder without .tar files; there are some in its folders",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_that_is_none_says_so(source, server, tmp_path, capsys):
    assert vlp("stats", source, "--to", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert SOURCES[source] in said and "Traceback" not in said


def test_patterns_name_shards_of_a_store(server):
    expected = [f"s3://bucket/in/0000{i}.tar" for i in range(3)]
    for pattern in ("s3://bucket/in/*.tar", "s3://bucket/*/0000?.tar", "s3://bucket/in/"):
        assert list(map(str, expand(pattern))) == expected
    assert list(map(str, expand(f"file://{server.root}/in"))) == sorted(
        map(str, (server.root / "in").glob("*.tar"))
    )


@pytest.mark.parametrize("command", ["export run --to", "embed a b --out", "eval m --out"])
def test_commands_that_write_here_only_refuse_addresses(command, server, capsys):
    *words, option = command.split()
    with contextlib.suppress(SystemExit):
        assert main([*words, option, "s3://bucket/out"]) == 1
        assert "writes into folders of this machine only" in capsys.readouterr().err
    assert not Path("s3:").exists()


@pytest.mark.parametrize("name", ["ClientAuthenticationError", "RefreshError"])
def test_refusals_that_are_no_permission_errors_are_told_at_once(name, server, monkeypatch):
    n_tries = []

    def refused(*_: object, **__: object) -> None:
        n_tries.append(1)
        raise type(name, (Exception,), {})("told by the store")

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", refused)
    folder = stored.destination("s3://bucket/in")
    with pytest.raises(PermissionError, match=r"told by the store\); look at the credentials"):
        os.fspath(folder / "00000.tar")
    assert len(n_tries) == 1


def test_a_full_disk_is_told_at_once(server, monkeypatch):
    n_tries = []

    def full(*_: object, **__: object) -> None:
        n_tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(s3fs.S3FileSystem, "get_file", full)
    folder = stored.destination("s3://bucket/in")
    with pytest.raises(OSError, match=r"be read \(1 tries: .*the disk of this machine is full"):
        os.fspath(folder / "00000.tar")
    assert len(n_tries) == 1


# ---- other stores


class Fixed(Plain):
    """One that cannot."""

    protocol = "fixed"

    def mv(self, path1: str, path2: str, **_: object) -> None:
        raise NotImplementedError("no rename")


@pytest.fixture
def plain(server: Store, monkeypatch: pytest.MonkeyPatch) -> type[Plain]:
    monkeypatch.setattr(Plain, "root", str(server.root))
    monkeypatch.setattr(Plain, "renamed", [])
    fsspec.register_implementation("plain", Plain, clobber=True)
    fsspec.register_implementation("fixed", Fixed, clobber=True)
    return Plain


def test_a_store_that_shows_parts_is_given_whole_files(plain, server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    assert vlp("filter", "plain://in", *FILTER, "--to", "plain://deep/out") == 0
    assert content(server.root / "deep" / "out") == here
    named = [Path(path).name for path in plain.renamed]
    assert len(named) > len(here) and all(name.endswith(".tmp") for name in named)


def test_what_is_there_is_replaced(plain, server):
    for scheme in ("plain", "s3"):
        folder = stored.destination(f"{scheme}://bucket/out")
        for data in (b"one", b"two"):
            write_atomically(folder / "a.json", data)
        kept = server.root / ("out" if scheme == "s3" else "bucket/out") / "a.json"
        assert kept.read_bytes() == b"two", scheme


def test_a_store_without_rename_is_refused_before_work_starts(plain, server, capsys):
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "fixed://deep/out") == 1
    assert "cannot be written: its store cannot (NotImplementedError: no rename)" in (
        capsys.readouterr().err
    )
    assert not [request for request in server.requests if "/in/0" in request]
    assert not list((server.root / "deep" / "out").iterdir())


def test_the_hub_is_read_and_written(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", "--min-words", 2)
    with loopback_hub() as hub:
        hub.repos["me/set"] = {}
        stores.use({"hf": {"endpoint": hub.url, "token": TOKEN}})
        for source, to in (("s3://bucket/in", "first"), ("hf://me/set/first", "second")):
            assert vlp("filter", source, "--min-words", 2, "--to", f"hf://me/set/{to}") == 0
        for folder in ("first", "second"):
            for name, data in hub.repos["me/set"].items():
                if name.startswith(f"{folder}/"):
                    place = tmp_path / "of_hub" / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(data)
            assert content(tmp_path / "of_hub" / folder) == here


def test_a_store_that_fails_is_not_taken_for_a_picture_that_is_broken(server, monkeypatch):
    """A chunk's mark would leave all its pictures out, for good."""
    data = encoded(picture(0))
    write_tar(server.root / "photos.tar", [("broken.png", data[:60]), ("whole.png", data)])
    with tarfile.open(server.root / "photos.tar") as tar:
        sources = [
            Source(
                member.name, Place("s3://bucket/photos.tar", member.offset_data, member.size), {}
            )
            for member in tar
        ]
    check = Check(Pictures(0, "keep", 90, False), 2, None)
    chunk = Chunk(0, sources, Path())

    server.refused_from = len(server.requests)
    with pytest.raises(OSError, match=r"photos\.tar"):
        check(chunk)
    server.refused_from = None
    forget_all(monkeypatch)
    assert [i for i, _ in check(chunk)["problems"]] == [0]
