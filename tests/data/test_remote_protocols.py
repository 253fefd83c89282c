"""Shards behind http:// and s3:// on loopback: the same batches as from disk, through errors,
dropped connections, stalls.
"""

from __future__ import annotations

import os
import shutil

import pytest

from tests.data.loopback_store import store
from tests.data.material import data_of, loader_of, write_shards
from tests.data.test_loader import same, take
from tests.loopback_hub import TOKEN, loopback_hub
from vlp.data import asking, fetch
from vlp.data.sources import shards as shard_files
from vlp.data.steps import DataAway
from vlp.leaving import wait_for_rows
from vlp.lifetime import StopRequest


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """20 shards of 10 samples."""
    return write_shards(tmp_path_factory.mktemp("written") / "shards", 200, 10)


@pytest.fixture
def server(written, tmp_path, monkeypatch):
    """The shards on a server, and an empty cache."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    shutil.copytree(written, tmp_path / "root" / "train")
    with store(tmp_path / "root") as running:
        yield running


def http(server) -> dict:
    return {"name": "remote", "path": f"{server.url}/train/{{00000..00019}}.tar", "window": 2}


def s3(server) -> dict:
    keys = {
        "key": "k",
        "secret": "s",
        "client_kwargs": {"endpoint_url": server.url, "region_name": "us-east-1"},
    }
    return {"name": "remote", "path": "s3://bucket/train/", "window": 2, "storage": keys}


# Over http the runs of `test_remote_runs` read as well.
@pytest.mark.parametrize("kind", [pytest.param(http, marks=pytest.mark.slow), s3])
def test_batches_equal_those_of_the_same_files_here(server, kind):
    here = {"name": "remote", "path": f"file://{server.root}/train/", "window": 2}
    reference = take(loader_of(data_of(here), 10), 25)
    loader = loader_of(data_of(kind(server)), 10)
    assert loader.n_samples == 200
    assert all(same(next(loader), batch) for batch in reference)

    tars = {name: times for name, times in server.served.items() if name.endswith(".tar")}
    assert len(tars) == 20 and set(tars.values()) == {1}  # the second epoch reads the cache


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("error", s3),
        ("drop", http),
        pytest.param("error", http, marks=pytest.mark.slow),
        pytest.param("drop", s3, marks=pytest.mark.slow),
        pytest.param("stall", http, marks=pytest.mark.slow),
        pytest.param("stall", s3, marks=pytest.mark.slow),
    ],
)
def test_a_server_that_fails_now_and_then_costs_nothing_but_time(server, kind, fault):
    reference = take(loader_of(data_of(kind(server)), 10), 8)
    for copy in (fetch.cache_folder() / "shards").glob("*/*.tar"):
        copy.unlink()
    server.faults = [fault, "", fault]
    loader = loader_of(data_of({**kind(server), "stall_s": 0.5}), 10)
    assert all(same(next(loader), batch) for batch in reference)
    assert server.suffered[fault] >= 2 and loader.counters()["bad_samples"] == 0


def test_an_index_that_cannot_be_had_at_once_is_not_taken_for_missing(server):
    """Without it every shard would be fetched to make one."""
    server.ending = "_index.bin"
    faults = ["error", "drop", "away"]
    server.faults = [*faults]
    assert loader_of(data_of(http(server)), 10).n_samples == 200

    assert not server.faults and all(server.suffered[fault] == 1 for fault in faults)
    assert not list((fetch.cache_folder() / "shards").rglob("*.tar"))


def test_a_server_that_is_away_is_tried_again_and_a_missing_file_is_not(server):
    cache, name = fetch.Cache(10**9), "train/00000.tar"
    server.faults = ["away", "away"]
    with open(cache.get(f"{server.url}/{name}"), "rb") as copy:
        assert copy.read() == (server.root / name).read_bytes()
    assert server.suffered["away"] == 2
    with pytest.raises(
        OSError, match=r"cannot fetch http://127.0.0.1:1/0.tar \(4 tries\): ClientConnector"
    ):
        cache.get("http://127.0.0.1:1/0.tar")  # refused

    before = server.suffered.total()
    with pytest.raises(FileNotFoundError):
        cache.get(f"{server.url}/train/99999.tar")
    assert server.suffered.total() == before + 1


@pytest.mark.parametrize(
    "fault",
    [
        "stall",
        "away",
        pytest.param("error", marks=pytest.mark.slow),
        pytest.param("drop", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_never_recovers_ends_the_run_with_its_name(server, fault, capsys):
    loader = loader_of(data_of({**http(server), "stall_s": 0.1, "patience_s": 0.4}), 10)
    server.faults = [fault] * 10_000
    place = r"http://127.0.0.1:\d+/train"
    # A fetch in the background may hold the shard all the time.
    reason = rf"(cannot fetch {place}/\d+.tar \(|\d+.tar is still being fetched)"
    with pytest.raises(DataAway, match=rf"step 0: {place} gave no shard for .*{reason}"):
        take(loader, 5)
    said = capsys.readouterr().err
    # While a stalled fetch holds it, there is nothing to say of it before the end.
    assert "it is waited for up to" in said or fault == "stall"


def test_a_server_that_comes_back_in_time_costs_nothing_but_time(server):
    reference = take(loader_of(data_of(http(server)), 10), 8)
    for copy in (fetch.cache_folder() / "shards").glob("*/*.tar"):
        copy.unlink()
    # More than the tries of one shard; the next shard is asked for meanwhile, too.
    server.faults = ["error"] * 30
    loader = loader_of(data_of({**http(server), "patience_s": 60}), 10)
    assert all(same(next(loader), batch) for batch in reference)
    assert server.suffered["error"] == 30 and loader.counters()["bad_samples"] == 0


def test_a_store_that_was_lost_is_not_waited_for_again(server):
    """Nor are the rows of the step after given for those that are missing."""
    loader = loader_of(data_of({**http(server), "patience_s": 0.1}), 10)
    server.faults = ["error"] * 10_000
    stop = StopRequest()
    assert not wait_for_rows(loader, stop)
    assert "step 0: " in stop.lacks and "gave no shard for" in stop.lacks

    server.faults = []
    assert not wait_for_rows(loader, stop)


# ---- the Hub


@pytest.fixture
def hub(server):
    """The shards in a data set of a Hub, where one repository is private."""
    with loopback_hub() as running:
        folder = server.root / "train"
        files = {f"train/{path.name}": path.read_bytes() for path in folder.iterdir()}
        running.repos |= {"me/pairs": files, "me/secret": files}
        running.private.add("me/secret")
        yield running


def on_hub(hub, path: str, token: str | bool = False) -> dict:
    storage = {"endpoint": hub.url, "token": token}
    return {"name": "remote", "path": f"hf://datasets/{path}", "window": 2, "storage": storage}


@pytest.mark.parametrize(
    ("path", "token"),
    [
        pytest.param("me/pairs/train/", False, marks=pytest.mark.slow),
        ("me/pairs@main/train/{00000..00019}.tar", False),
        ("me/secret/train/", TOKEN),
    ],
)
def test_shards_of_the_hub_are_those_of_the_same_files_here(server, hub, path, token):
    here = {"name": "remote", "path": f"file://{server.root}/train/", "window": 2}
    reference = take(loader_of(data_of(here), 10), 3)
    loader = loader_of(data_of(on_hub(hub, path, token)), 10)
    # The index beside the shards was enough to know them.
    assert loader.n_samples == 200
    assert all(same(next(loader), batch) for batch in reference)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("me/secret/train/", "no shard at .*401.*; the server refuses it: .* such as a token"),
        ("me/secret/train/{00000..00019}.tar", "no shard at .*401.* such as a token"),
        ("me/none/train/", "no shard at .*repository not found"),
        ("me/pairs/none/", "names no shards"),
        ("me/pairs/train/00020.tar", r"no shard at datasets/me/pairs/train/00020.tar$"),
    ],
)
def test_what_the_hub_does_not_give_is_told_before_anything_starts(hub, path, message):
    with pytest.raises(ValueError, match=message):
        loader_of(data_of(on_hub(hub, path)), 10)


def test_a_token_that_expires_in_mid_run_is_told(hub):
    loader = loader_of(data_of(on_hub(hub, "me/pairs/train/")), 10)
    take(loader, 2)
    hub.private.add("me/pairs")
    with pytest.raises(DataAway, match=r"step \d+: hf://.*/train refuses what it gave before.*401"):
        take(loader, 30)


# ---- the cache


def signed(server, signature: str, **options) -> dict:
    """The shards at addresses with credentials and a signature."""
    host = server.url.replace("http://", f"http://anna:{signature}@")
    query = f"?X-Amz-Credential=AKIA/{signature}/us-east-1&X-Amz-Signature={signature}"
    return {
        "name": "remote",
        "path": f"{host}/train/{{00000..00019}}.tar{query}",
        "window": 2,
        **options,
    }


def test_a_new_signature_fetches_nothing_again_and_is_written_nowhere(server):
    (server.root / "train" / "_index.bin").unlink()
    first = take(loader_of(data_of(signed(server, "PLANTED1")), 10), 20)
    tars = {name: times for name, times in server.served.items() if name.endswith(".tar")}
    assert len(tars) == 20 and set(tars.values()) == {1}

    again = take(loader_of(data_of(signed(server, "PLANTED2")), 10), 20)
    assert all(same(a, b) for a, b in zip(first, again))
    assert {name: times for name, times in server.served.items() if name.endswith(".tar")} == tars

    held = [path for path in fetch.cache_folder().rglob("*") if path.is_file()]
    assert len(held) > 40
    assert not [path for path in held if "PLANTED" in str(path) or b"PLANTED" in path.read_bytes()]


def test_signed_shards_stay_within_the_bound(server):
    size = (server.root / "train" / "00000.tar").stat().st_size
    loader = loader_of(data_of(signed(server, "PLANTED", cache_gb=8 * size / 1e9)), 10)
    most = 0
    for _ in range(20):
        next(loader)
        names = [path.name for path in (fetch.cache_folder() / "shards").glob("*/*")]
        most = max(
            most,
            len(
                [name for name in names if not name.startswith(".") and not name.endswith(".lock")]
            ),
        )
    assert 3 <= most <= 9 and loader.counters()["bad_samples"] == 0


def test_copies_stay_in_the_folder_that_was_chosen_at_the_start(server, tmp_path, monkeypatch):
    cache = fetch.Cache(10**9)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "another"))
    copy = cache.get(f"{server.url}/train/00000.tar")
    assert copy.startswith(str(tmp_path / "cache")) and not (tmp_path / "another").exists()


@pytest.mark.parametrize(
    ("damage", "keeps_time"),
    [
        ("flip", True),
        pytest.param("flip", False, marks=pytest.mark.slow),
        pytest.param("cut", False, marks=pytest.mark.slow),
        pytest.param("cut", True, marks=pytest.mark.slow),
        ("other", False),
        pytest.param("other", True, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_copy_is_fetched_again(server, damage, keeps_time, capsys):
    reference = take(loader_of(data_of(http(server)), 10), 20)
    copies = sorted((fetch.cache_folder() / "shards").glob("*/*.tar"))
    assert len(copies) == 20

    for copy in copies[::4]:
        data, before = bytearray(copy.read_bytes()), copy.stat().st_mtime_ns
        if damage == "flip":
            data[700] ^= 1  # in the first picture
        copy.write_bytes(
            {"flip": data, "cut": data[:-5000], "other": copies[1].read_bytes()}[damage]
        )
        if keeps_time:
            os.utime(copy, ns=(before, before))
    shard_files._Handle.cache_clear()  # as in the process of another run, which has no file open
    loader = loader_of(data_of(http(server)), 10)
    assert all(same(next(loader), batch) for batch in reference)

    tars = {name: times for name, times in server.served.items() if name.endswith(".tar")}
    assert sorted(tars.values()) == [1] * 15 + [2] * 5

    if damage != "cut":  # another size is noticed at the start
        assert capsys.readouterr().err.count("is not as it was fetched") == 5


@pytest.mark.parametrize("kind", [pytest.param(http, marks=pytest.mark.slow), s3])
def test_a_shard_that_changed_in_the_store_is_noticed_at_equal_size(server, kind):
    import s3fs

    shards = server.root / "train"
    (shards / "_index.bin").unlink()
    before = take(loader_of(data_of(kind(server)), 10), 20)
    data = (shards / "00007.tar").read_bytes()
    assert data.count(b"caption 70") > 0

    (shards / "00007.tar").write_bytes(data.replace(b"caption 70", b"numeral 70"))
    # as in another process, which has no file open and has listed nothing
    shard_files._Handle.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    after = take(loader_of(data_of(kind(server)), 10), 20)
    changed = [not same(a, b) for a, b in zip(before, after)]
    assert server.served["train/00007.tar"] == 2 and server.served["train/00006.tar"] == 1
    assert 1 <= sum(changed) <= 10
