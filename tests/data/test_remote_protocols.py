"""Shards behind http:// and s3:// on loopback: the same batches as from disk, through errors, dropped connections, stalls."""

from __future__ import annotations

import pytest

from tests.data.loopback_store import store
from tests.data.material import data_of, loader_of, write_shards
from tests.data.test_loader import same, take
from vlp.data import fetch
from vlp.data.loader import DataError

pytest.importorskip("aiohttp")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """20 shards of 10 samples on a server, and an empty cache."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_PAUSE_S", 0.001)
    write_shards(tmp_path / "root" / "train", 200, 10)
    with store(tmp_path / "root") as running:
        yield running


def http(server) -> dict:
    return {"name": "remote", "path": f"{server.url}/train/{{00000..00019}}.tar", "window": 2}


def s3(server) -> dict:
    keys = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": server.url, "region_name": "us-east-1"}}
    return {"name": "remote", "path": "s3://bucket/train/", "window": 2, "storage": keys}


@pytest.mark.parametrize("kind", [http, s3])
def test_batches_equal_those_of_the_same_files_here(server, kind):
    if kind is s3:
        pytest.importorskip("s3fs")
    here = {"name": "remote", "path": f"file://{server.root}/train/", "window": 2}
    reference = take(loader_of(data_of(here), 10), 25)
    loader = loader_of(data_of(kind(server)), 10)
    assert loader.n_samples == 200
    assert all(same(next(loader), batch) for batch in reference)
    tars = {name: times for name, times in server.served.items() if name.endswith(".tar")}
    assert len(tars) == 20 and set(tars.values()) == {1}  # the second epoch reads the cache


@pytest.mark.parametrize("kind", [http, s3])
@pytest.mark.parametrize("fault", ["error", "drop", "stall"])
def test_a_server_that_fails_now_and_then_costs_nothing_but_time(server, kind, fault):
    if kind is s3:
        pytest.importorskip("s3fs")
    reference = take(loader_of(data_of(kind(server)), 10), 8)
    for copy in (fetch.cache_folder() / "shards").glob("*/*.tar"):
        copy.unlink()
    server.faults = [fault, "", fault]
    loader = loader_of(data_of({**kind(server), "stall_s": 0.5}), 10)
    assert all(same(next(loader), batch) for batch in reference)
    assert server.suffered[fault] >= 2 and loader.counters()["bad_samples"] == 0


def test_a_server_that_is_away_is_tried_again_and_a_missing_file_is_not(server):
    cache, name = fetch.Cache(10**9), "train/00000.tar"
    server.faults = ["away", "away"]
    with open(cache.get(f"{server.url}/{name}"), "rb") as copy:
        assert copy.read() == (server.root / name).read_bytes()
    assert server.suffered["away"] == 2
    with pytest.raises(OSError, match=r"cannot fetch http://127.0.0.1:1/0.tar \(4 tries\): ClientConnector"):
        cache.get("http://127.0.0.1:1/0.tar")  # refused
    before = server.suffered.total()
    with pytest.raises(FileNotFoundError):
        cache.get(f"{server.url}/train/99999.tar")
    assert server.suffered.total() == before + 1


def test_a_server_that_never_recovers_ends_the_run_with_its_name(server):
    loader = loader_of(data_of(http(server)), 10)
    server.faults = ["error"] * 1000
    with pytest.raises(DataError, match=r"cannot fetch http://127.0.0.1:\d+/train/\d+.tar \(4 tries\): .*500"):
        take(loader, 5)
