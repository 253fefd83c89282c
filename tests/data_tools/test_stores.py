"""Tools of `vlp data` whose input and output lie in a store: the same files as on this machine,
through every fault of every request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.data.loopback_store import Store, store
from tests.data.material import write_shards
from vlp.cli import main
from vlp.data import fetch, stored, stores
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
    files = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if OF_THE_MACHINE in files:
        shards = open_index(folder / OF_THE_MACHINE)
        counts = {name: shard.count for name, shard in shards.items()}
        files[OF_THE_MACHINE] = json.dumps(counts).encode()
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
