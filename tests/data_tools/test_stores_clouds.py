"""Tools of `vlp data` on gs:// and abfs://, by gcsfs and adlfs themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.clouds import Azure, Google
from tests.data.loopback_store import Store, store
from tests.data.material import data_of, loader_of, write_shards
from tests.data.test_loader import same, take
from tests.data_tools.in_stores import FILTER, content, forget_all, local, vlp
from tests.data_tools.test_stores import FAULTS, walk
from vlp.data import asking, stores
from vlp.data_tools._run import writers

CLOUDS = {"gs": Google, "abfs": Azure}


def options(scheme: str, server: Store) -> dict:
    if scheme == "gs":
        return {"endpoint_url": server.url, "token": "anon", "project": "p"}
    key = "c2VjcmV0"
    return {
        "connection_string": f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={key};"
        f"BlobEndpoint={server.url}/account"
    }


@pytest.fixture(params=CLOUDS)
def scheme(request) -> str:
    return request.param


@pytest.fixture
def server(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Three shards of two samples in a store, and here."""
    # Before gcsfs is imported, as a call would.
    stores.use({"gs": {"endpoint_url": "http://127.0.0.1:9"}})
    import adlfs
    import gcsfs
    import gcsfs.retry
    from azure.storage.blob._shared.policies_async import ExponentialRetry

    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    monkeypatch.setattr(writers, "SETTLED_S", 0.0)
    monkeypatch.setattr(writers, "is_alive", lambda pid: False)
    monkeypatch.setattr(stores, "options", {})
    forget_all(monkeypatch)

    # The clients' own patience is seconds, and fifteen of them, a try.
    async def at_once(seconds: float) -> None:
        pass

    monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=at_once))
    monkeypatch.setattr(ExponentialRetry, "get_backoff_time", lambda self, settings: 0)
    write_shards(tmp_path / "root" / "in", 6, 2)
    with store(tmp_path / "root", CLOUDS[scheme]) as running:
        stores.use({scheme: options(scheme, running)})
        yield running
    gcsfs.GCSFileSystem.clear_instance_cache()
    adlfs.AzureBlobFileSystem.clear_instance_cache()


def test_what_a_store_holds_is_what_this_machine_would(scheme, server, tmp_path):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", f"{scheme}://bucket/in", *FILTER, "--to", f"{scheme}://bucket/out")
    assert vlp(*call) == 0
    assert content(server.root / "out") == here and len(here) > 10

    # A second call finds everything done.
    before = len(server.requests)
    assert vlp(*call) == 0
    again = server.requests[before:]
    assert not [one for one in again if one.startswith(("PUT", "POST")) and "tar" in one]
    assert content(server.root / "out") == here


def test_credentials_that_end_in_mid_run_lose_nothing(scheme, server, tmp_path, capsys):
    here = local(tmp_path, "filter", tmp_path / "root" / "in", *FILTER)
    call = ("filter", f"{scheme}://bucket/in", *FILTER, "--to")
    server.requests.clear()
    assert vlp(*call, f"{scheme}://bucket/whole") == 0
    n_requests = len(server.requests)

    server.requests.clear()
    server.refused_from = n_requests // 2
    assert vlp(*call, f"{scheme}://bucket/out") == 1
    said = capsys.readouterr().err
    assert "look at the credentials: they may have ended" in said
    assert "the same command goes on" in said
    # No try brings others: those that end the call, and what it would leave behind.
    assert len(server.requests) - server.refused_from < 12

    server.refused_from = None
    assert vlp(*call, f"{scheme}://bucket/out") == 0
    assert content(server.root / "out") == here


def test_what_cannot_be_written_to_is_refused_before_anything_is_read(scheme, server, capsys):
    nowhere = f"{scheme}://nowhere/out"
    assert vlp("filter", f"{scheme}://bucket/in", *FILTER, "--to", nowhere) == 1
    assert "no such bucket" in capsys.readouterr().err

    server.read_only = True
    server.requests.clear()
    out = f"{scheme}://bucket/out"
    assert vlp("filter", f"{scheme}://bucket/in", *FILTER, "--to", out) == 1
    assert f"does not let {out}" in capsys.readouterr().err
    assert not [one for one in server.requests if "00000.tar" in one]


def test_a_large_file_goes_in_pieces(scheme, server, tmp_path):
    """Resumable uploads of Google's, blocks of Azure's."""
    data = bytes(range(256)) * 2**15 + b"end"  # 8 MiB
    place = f"{scheme}://bucket/large/file.bin"
    (tmp_path / "large").write_bytes(b"before")
    stores.put(tmp_path / "large", place)

    # What is there is replaced.
    (tmp_path / "large").write_bytes(data)
    stores.put(tmp_path / "large", place)
    assert (server.root / "large/file.bin").read_bytes() == data
    assert stores.part(place, 2**20 + 5, 2**20 + 50) == data[2**20 + 5 : 2**20 + 50]

    stores.fetch(place, tmp_path / "back", len(data))
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_requests_may_fail_in_every_way(scheme, server, tmp_path):
    write_shards(server.root / "one", 1, 1)
    here = local(tmp_path, "filter", server.root / "one", "--min-words", 2)
    call = ("filter", f"{scheme}://bucket/one", "--min-words", 2, "--to")
    faults = [[fault] for fault in FAULTS]
    assert walk(server, call, here, faults, 2, bucket=f"{scheme}://bucket", patience=100) > 1


def test_training_reads_the_same_batches(scheme, server, tmp_path):
    write_shards(server.root / "train", 60, 10)
    storage = options(scheme, server)
    reference = take(
        loader_of(
            data_of({"name": "remote", "path": f"file://{server.root}/train/", "window": 2}), 10
        ),
        8,
    )
    server.faults = ["error", "drop", "error"]
    source = {"name": "remote", "path": f"{scheme}://bucket/train/", "window": 2}
    loader = loader_of(data_of(source | {"storage": storage}), 10)
    assert loader.n_samples == 60
    assert all(same(next(loader), batch) for batch in reference)
    assert server.suffered["error"] == 2 and server.suffered["drop"] == 1
