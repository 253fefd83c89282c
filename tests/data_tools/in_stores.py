"""A store with shards for the tools of `vlp data`, and what they write there."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.data.loopback_store import Store, store
from tests.data.material import encoded, picture, write_shards, write_tar
from tests.data_tools import mining
from tests.data_tools.nouns import write_wordnet
from tests.data_tools.tools import CAPTIONS
from vlp.cli import main
from vlp.data import asking, stored, stores
from vlp.data.format import ShardWriter
from vlp.data.index_file import NAME, open_index
from vlp.data_tools._run import writers

# Whose times are those of the machine that wrote the shards.
OF_THE_MACHINE = NAME
# What a process remembers, anew for each test.
STATE = {
    stores: ("signed", "_listed"),
    stored: ("_scratch", "_growing", "_compared"),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three shards of two samples in a store, and here."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    monkeypatch.setattr(writers, "SETTLED_S", 0.0)
    # The call before is of this process, which lives; it has ended all the same.
    monkeypatch.setattr(writers, "is_alive", lambda pid: False)
    write_shards(tmp_path / "root" / "in", 6, 2)
    monkeypatch.setattr(stores, "options", {})
    forget_all(monkeypatch)
    with store(tmp_path / "root") as running:
        # The clients' own patience would add minutes to the walk below.
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        stores.use({"s3": options(running)})
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


def forget_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be as a process that has just begun."""
    for module, names in STATE.items():
        for name in names:
            monkeypatch.setattr(module, name, type(vars(module)[name])())


def options(server: Store) -> dict:
    return {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": server.url, "region_name": "us-east-1"},
        "config_kwargs": {"retries": {"total_max_attempts": 1}, "read_timeout": 2},
    }


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder but its index, and the samples that this counts."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.name == OF_THE_MACHINE:
            counts = {name: shard.count for name, shard in open_index(path).items()}
            files[str(path.relative_to(folder))] = json.dumps(counts).encode()
        elif path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def vlp(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def local(tmp_path: Path, *arguments: object) -> dict[str, bytes]:
    """What the same call writes on this machine."""
    assert vlp(*arguments, "--to", tmp_path / "here") == 0
    return content(tmp_path / "here")


FILTER = ("--max-repeats", 3, "--min-words", 2)  # with a survey before the shards


def dead_process() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


@pytest.fixture
def material(server: Store) -> Path:
    """What the tools read, in the store."""
    root = server.root
    write_shards(root / "train", 8, 4)
    write_shards(root / "twins", 6, 3, start=4)
    with ShardWriter(root / "count", 3) as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(None, encoded(picture(i)), "png", captions)
    write_shards(root / "packed", 4, 2, start=20)
    for path in (root / "packed").glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()
    mining.write(root / "mined")
    mining.store(root / "embedded", *mining.twins())
    write_wordnet(root / "wordnet")
    (root / "queries.txt").write_text("caption\nalso\n7\n")
    write_tar(root / "photos.tar", [(f"{i}.png", encoded(picture(i))) for i in range(4)])
    (root / "photos.csv").write_text(
        "image,caption\n" + "".join(f"{i}.png,a {i}\n" for i in range(4))
    )
    return root
