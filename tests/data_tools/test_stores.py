"""Tools of `vlp data` whose input and output lie in a store: the same files as on this machine,
through every fault of every request.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.data.loopback_store import Store, store
from tests.data.material import encoded, picture, write_shards, write_tar
from tests.data_tools import mining
from tests.data_tools.tools import CAPTIONS
from vlp.cli import main
from vlp.data import fetch, stored, stores
from vlp.data.format import ShardWriter
from vlp.data.index_file import NAME, open_index
from vlp.data_tools._run import writers

# Whose times are those of the machine that wrote the shards.
OF_THE_MACHINE = NAME
# What a process remembers, anew for each test.
STATE = {
    stores: ("options", "signed", "_listed"),
    stored: ("_scratch", "_growing", "_compared"),
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three shards of two samples in a store, and here."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.001)
    monkeypatch.setattr(stores, "_PAUSE_S", 0.001)
    monkeypatch.setattr(writers, "BEAT_S", 0.02)
    write_shards(tmp_path / "root" / "in", 6, 2)
    for module, names in STATE.items():
        for name in names:
            monkeypatch.setattr(module, name, type(vars(module)[name])())
    with store(tmp_path / "root") as running:
        # The clients' own patience would add minutes to the walk below.
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        stores.use({"s3": options(running)})
        yield running
    s3fs.S3FileSystem.clear_instance_cache()


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


def test_what_a_store_holds_is_what_this_machine_would(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    assert content(server.root / "out") == here and len(here) > 10

    # A second call finds everything done, by one list of the folder: not by asking for each mark.
    before = len(server.requests)
    assert vlp("filter", "s3://bucket/in", *FILTER, "--to", "s3://bucket/out") == 0
    again = server.requests[before:]
    assert not [request for request in again if request.startswith("PUT") and "tar" in request]
    assert not [request for request in again if request.startswith("HEAD") and "out/" in request]
    assert content(server.root / "out") == here


# Each tool with its options; {in}: the folder of its input, {file}: where it writes a file.
TOOLS = {
    "stats": ["{in}/train", "--to", "{out}"],
    "negatives": ["{in}/train", "--to", "{out}"],
    "counting": ["{in}/count", "--to", "{out}"],
    "reshard": [
        "{in}/train::{in}/packed",
        "--to",
        "{out}",
        "--shuffle",
        0,
        "--samples-per-shard",
        5,
    ],
    "dedup": ["{in}/twins", "--to", "{out}", "--against", "{in}/train"],
    "dedup by cosine": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--distance", -1),
    ],
    "mine": ["{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--images"],
    "mine an order": [
        *("{in}/mined", "--to", "{out}", "--embeddings", "{in}/embedded", "--order", 2),
    ],
    "validate": ["{in}/train", "--json", "{out}/report.json", "--notes", "{out}"],
    "sheet": ["{in}/train", "--to", "{out}/sheet.html", "--samples", 3],
    "scenes": [
        *("--to", "{out}", "--train", 3, "--val", 0, "--test", 2, "--zeroshot", 0),
        *("--retrieval", 2, "--proofs", 0, "--size", 16, "--processes", 1),
    ],
    "pack": ["{in}/photos.tar", "--captions", "{in}/photos.csv", "--to", "{out}"],
}


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
    write_tar(root / "photos.tar", [(f"{i}.png", encoded(picture(i))) for i in range(4)])
    (root / "photos.csv").write_text(
        "image,caption\n" + "".join(f"{i}.png,a {i}\n" for i in range(4))
    )
    return root


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool(name, material, server, tmp_path):
    def called(folder: str, out: str) -> None:
        arguments = [str(word).format(**{"in": folder, "out": out}) for word in TOOLS[name]]
        status = vlp(name.split()[0], *arguments)
        assert status == 0

    (tmp_path / "here").mkdir()
    called(str(material), str(tmp_path / "here"))
    here = content(tmp_path / "here")
    called("s3://bucket", "s3://bucket/made/here")

    # Places stand in reports and lists for people.
    there = content(server.root / "made" / "here")
    for path, data in there.items():
        data = data.replace(b"s3://bucket", str(material).encode())
        there[path] = data.replace("s3: …/".encode(), "…/".encode())
    assert there == here and here
    assert not [path for path in server.root.rglob(".*") if path.is_file()]


def walk(server: Store, call: tuple, here: dict[str, bytes], faults: list[list[str]]) -> int:
    """Let each request of a call fail in turn, by the faults of its turn, so often that no patience
    outlasts it in every other turn; returns how many calls ended, and had to be made again.
    """
    server.requests.clear()
    assert vlp(*call, "s3://bucket/whole") == 0
    n_requests = len(server.requests)
    assert n_requests > 15

    n_ended = n_walked = 0
    for number in range(n_requests):
        for fault in faults[number % len(faults)]:
            folder = f"{fault}{number}"
            server.requests.clear()
            n_faults = PATIENCE if number % 2 else 1
            server.faulty = {number + i: fault for i in range(n_faults)}
            status = vlp(*call, f"s3://bucket/{folder}")
            server.faulty = {}
            if status:
                n_ended += 1
                assert vlp(*call, f"s3://bucket/{folder}") == 0
            assert content(server.root / folder) == here, (fault, number)
            n_walked += 1
    assert n_walked >= n_requests
    return n_ended


PATIENCE = 20  # more than the tries of all layers
FAULTS = ["error", "drop", "late", "cut"]


def test_a_request_may_fail(server, tmp_path):
    write_shards(server.root / "one", 1, 1)
    here = local(tmp_path, "filter", server.root / "one", "--min-words", 2)
    call = ("filter", "s3://bucket/one", "--min-words", 2, "--to")
    assert walk(server, call, here, [[fault] for fault in FAULTS]) > 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_request_may_fail_in_every_way(server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", "s3://bucket/in", *FILTER, "--to")
    assert walk(server, call, here, [FAULTS]) > 50
