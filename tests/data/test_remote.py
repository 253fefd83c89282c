"""Remote shards: the order keeps to a window, each shard is fetched once an epoch at most, failures
are retried and told.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import fsspec
import pytest

from tests.data.material import data_of, encoded, loader_of, picture, write_shards
from tests.data.test_loader import joined, same, take
from vlp.config import Captions
from vlp.data import asking
from vlp.data.fetch import Cache
from vlp.data.format import ShardWriter
from vlp.data.loader import DataError
from vlp.data.sources import remote as module
from vlp.schema import ConfigError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """40 shards of 10 samples."""
    return write_shards(tmp_path_factory.mktemp("written") / "shards", 400, 10)


@pytest.fixture
def bucket(written, tmp_path, monkeypatch):
    """The shards behind an address, and an empty cache."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    return Path(shutil.copytree(written, tmp_path / "bucket"))


def remote(bucket, **options):
    return {"name": "remote", "path": f"file://{bucket}/", "window": 3, **options}


def cached(tmp_path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "shards").glob("*/*.tar")}


def test_epochs_are_whole_windowed_and_read_ahead(bucket, tmp_path, monkeypatch):
    fetched: Counter[str] = Counter()
    real = Cache._fetch
    monkeypatch.setattr(
        Cache,
        "_fetch",
        lambda self, url, *rest: (fetched.update([url]), real(self, url, *rest))[1],
    )
    loader = loader_of(data_of(remote(bucket), lanes=1), 10)
    assert loader.n_samples == 400 and not fetched  # the index beside the shards was enough
    next(loader)
    assert sum(fetched.values()) <= 8
    ids = [i for _ in range(39) for i in next(loader).sample_id.tolist()]
    assert len(set(ids)) == 390 and set(fetched.values()) == {1}
    windows = [{i // 10 for i in ids[start - 10 : start + 20]} for start in range(30, 360, 30)]
    assert all(len(window) == 3 for window in windows)
    one, two = (take(loader_of(data_of(remote(bucket)), 10), 3) for _ in range(2))
    assert all(same(a, b) for a, b in zip(one, two))


def test_ranks_workers_and_resuming_change_nothing(bucket, tmp_path, monkeypatch):
    data = data_of(remote(bucket), workers=2)
    reference = take(loader_of(data_of(remote(bucket)), 8), 12)
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "another"))
    loader = loader_of(data, 8)
    assert all(same(next(loader), batch) for batch in reference[:5])
    # Counted in the loader processes.
    shard_bytes = (bucket / "00000.tar").stat().st_size
    assert 3 * shard_bytes <= loader.traffic()["fetched_bytes"] <= 40 * shard_bytes
    assert 0 < loader.traffic()["used_bytes"] < 5 * shard_bytes
    for world in (1, 2, 4):
        ranks = [loader_of(data_of(remote(bucket)), 8, rank=r, world=world) for r in range(world)]
        for rank in ranks:
            rank.load_state_dict(loader.state_dict())
        assert all(same(joined([next(rank) for rank in ranks]), batch) for batch in reference[5:])


def test_a_run_that_began_before_there_were_lanes_goes_on_in_its_order(bucket):
    before = loader_of(data_of(remote(bucket), lanes=1), 8)
    reference = take(before, 6)
    state = loader_of(data_of(remote(bucket), lanes=1), 8).state_dict(3)
    assert state.pop("lanes") == 1 and state.pop("windows") == [3]

    loader = loader_of(data_of(remote(bucket)), 8)
    assert not same(next(loader), reference[0])  # in as many lanes as its window has shards
    loader.load_state_dict(state)
    assert all(same(next(loader), batch) for batch in reference[3:])
    assert loader.state_dict()["lanes"] == 1

    with pytest.raises(DataError, match="lanes was 1, is 4"):
        loader_of(data_of(remote(bucket), lanes=4), 8).load_state_dict(state)
    state |= {"lanes": 3, "windows": [9]}
    with pytest.raises(DataError, match=r"windows was \[9\], is \[3\]"):
        loader_of(data_of(remote(bucket)), 8).load_state_dict(state)


def test_lanes_that_no_shards_can_be_dealt_to_are_refused(bucket, tmp_path):
    local = {"name": "shards", "path": str(bucket)}
    for source, options, reason in (
        (local, {}, "no source fetches its shards"),
        (remote(bucket), {"shuffle": False}, "shuffle is false"),
    ):
        with pytest.raises(ValueError, match=f"data.lanes is 2, but .*{reason}"):
            loader_of(data_of(source, lanes=2, **options), 8)
    with pytest.raises(ConfigError, match="lanes is 0; expected at least 1"):
        data_of(local, lanes=0)


def test_braces_lists_mixing_and_local_sources(bucket, tmp_path):
    local = write_shards(tmp_path / "local", 50, 25, start=900)
    path = f"file://{bucket}/{{00000..00004}}.tar::file://{bucket}/00039.tar"
    data = data_of(
        {**remote(bucket, path=path), "weight": 1},
        {"name": "shards", "path": str(local), "weight": 1},
    )
    loader = loader_of(data, 10)
    assert loader.n_samples == 110
    seen = Counter(int(i) >= 60 for _ in range(22) for i in next(loader).sample_id)
    assert seen[True] == seen[False] == 110
    together = loader_of(data_of(remote(bucket, path=path), local), 10)
    ids = [i for _ in range(11) for i in next(together).sample_id.tolist()]
    assert sorted(ids) == list(range(110))


def test_shards_without_an_index_are_fetched_once_to_make_it(bucket, tmp_path, capsys):
    (bucket / "_index.bin").unlink()
    assert loader_of(data_of(remote(bucket)), 8).n_samples == 400
    assert (
        "40 of 40 shards have no index" in capsys.readouterr().err and len(cached(tmp_path)) == 40
    )
    assert loader_of(data_of(remote(bucket)), 8).n_samples == 400
    assert not capsys.readouterr().err and not (bucket / "_index.bin").exists()
    # A shard that changed is noticed by its size, its old copy is dropped.
    os.truncate(bucket / "00007.tar", 10_240)
    assert loader_of(data_of(remote(bucket)), 8).n_samples < 400
    assert "1 of 40 shards" in capsys.readouterr().err


def test_the_cache_stays_within_its_bound(bucket, tmp_path):
    size = (bucket / "00000.tar").stat().st_size
    loader = loader_of(data_of(remote(bucket, window=2, cache_gb=10 * size / 1e9)), 10)
    most = 0
    for _ in range(80):
        next(loader)
        most = max(most, len(cached(tmp_path)))
    assert 3 <= most <= 11 and loader.counters()["bad_samples"] == 0
    with pytest.raises(ValueError, match=r"three windows of 4 shards need"):
        loader_of(data_of(remote(bucket, window=4, cache_gb=10 * size / 1e9)), 10)


class Flaky:
    """Fails every address with this ending `failures` times with `error`, then works."""

    def __init__(self, failures: int, error: Exception, ending: str = ".tar") -> None:
        self.failures, self.error, self.seen, self.real = failures, error, Counter(), fsspec.open
        self.ending = ending

    def __call__(self, url, *args, **kwargs):
        if str(url).endswith(self.ending):
            self.seen[url] += 1
            if self.seen[url] <= self.failures:
                raise self.error
        return self.real(url, *args, **kwargs)


def test_failures_are_tried_again(bucket, tmp_path, monkeypatch):
    reference = take(loader_of(data_of(remote(bucket)), 10), 10)
    for copy in (tmp_path / "cache" / "shards").glob("*/*.tar"):
        copy.unlink()
    monkeypatch.setattr(fsspec, "open", Flaky(2, ConnectionResetError("connection reset")))
    loader = loader_of(data_of(remote(bucket)), 10)
    assert (
        all(same(next(loader), batch) for batch in reference)
        and loader.counters()["bad_samples"] == 0
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (TimeoutError("timed out"), r"gave no shard for .*cannot fetch .*TimeoutError: timed out"),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"is full, set cache_gb lower or VLP_CACHE elsewhere",
        ),
    ],
)
def test_a_server_that_stays_away_and_a_full_disk_end_the_run_with_the_reason(
    bucket, monkeypatch, error, message
):
    monkeypatch.setattr(fsspec, "open", Flaky(10**6, error))
    with pytest.raises(DataError, match=message):
        next(loader_of(data_of(remote(bucket, patience_s=0.1)), 10))


def test_a_shard_that_failed_rests_before_it_is_tried_again(bucket, monkeypatch):
    source = module.open(module.Options(f"file://{bucket}/"), Captions())
    # Asked for again once another shard came: the store might have come back.
    flaky = Flaky(8, ConnectionResetError("connection reset"), "00000.tar")
    monkeypatch.setattr(fsspec, "open", flaky)
    for i in range(10):
        with pytest.raises(OSError, match=r"cannot fetch .*00000.tar \(4 tries\)"):
            source[i]
    assert flaky.seen.total() == 8
    monkeypatch.setattr(module, "_REST_S", 0)
    assert source[3].sample_id == 3


def test_a_shard_is_fetched_by_one_of_many_at_a_time(bucket, monkeypatch):
    fetched: Counter[str] = Counter()
    real = Cache._fetch
    monkeypatch.setattr(
        Cache,
        "_fetch",
        lambda self, url, *rest: (fetched.update([url]), real(self, url, *rest))[1],
    )
    cache = Cache(10**9)
    with ThreadPool(8) as pool:
        paths = pool.map(cache.get, [f"file://{bucket}/00000.tar"] * 40)
    assert len(set(paths)) == 1 and fetched.total() == 1
    assert open(paths[0], "rb").read() == (bucket / "00000.tar").read_bytes()  # noqa: SIM115


def test_wrong_addresses_say_so(bucket):
    for path, message in (
        (f"file://{bucket}/none/", "names no shards"),
        (f"file://{bucket}/9.tar", "no shard at"),
        ("nosuch://x/0.tar", "nosuch"),
    ):
        with pytest.raises(ValueError, match=message):
            loader_of(data_of(remote(bucket, path=path)), 8)


@pytest.mark.parametrize(
    ("n_shards", "world", "batch", "lanes", "window"),
    [
        (1, 4, 4, "auto", 3),
        (3, 4, 4, 8, 3),
        pytest.param(5, 2, 4, 2, 3, marks=pytest.mark.slow),
        (9, 4, 8, "auto", 20),
        pytest.param(7, 3, 12, 3, 2, marks=pytest.mark.slow),
    ],
)
def test_each_sample_comes_once_an_epoch_from_any_number_of_shards(
    bucket, n_shards, world, batch, lanes, window
):
    path = f"file://{bucket}/{{00000..{n_shards - 1:05d}}}.tar"
    data = data_of(remote(bucket, path=path, window=window), lanes=lanes)
    ranks = [loader_of(data, batch, rank=r, world=world, pixels=False) for r in range(world)]
    n_steps = ranks[0].steps_per_epoch
    assert n_steps == 10 * n_shards // batch

    seen = [int(i) for _ in range(n_steps) for rank in ranks for i in next(rank).sample_id]
    assert len(set(seen)) == len(seen) == n_steps * batch


def test_four_nodes_fetch_each_shard_once_among_them_also_for_stand_ins(
    bucket, tmp_path, monkeypatch
):
    # One sample in ten does not decode, each in another shard.
    broken = tmp_path / "broken"
    with ShardWriter(broken, 10) as writer:
        for i in range(200):
            image = b"no picture" if i % 10 == 7 else encoded(picture(i % 5))
            writer.add(None, image, "png", [f"caption {i}"], {})
    opened: Counter[str] = Counter()
    real = fsspec.open

    def counted(url, *args, **kwargs):
        opened[str(url).rpartition("/")[2]] += str(url).endswith(".tar")
        return real(url, *args, **kwargs)

    ranks = []
    for rank in range(4):
        monkeypatch.setenv("VLP_CACHE", str(tmp_path / f"cache{rank}"))
        data = data_of(remote(broken), lanes=4, bad_share=1.0)
        ranks.append(loader_of(data, 8, rank=rank, world=4))
    monkeypatch.setattr(fsspec, "open", counted)
    for _ in range(ranks[0].steps_per_epoch):
        for rank in ranks:
            next(rank)
    n_bad = sum(rank.counters()["bad_samples"] for rank in ranks)
    assert n_bad >= 20
    # Shards at the borders of two nodes, and the first of the next epoch, fetched ahead.
    n_opened = sum(n for name, n in opened.items() if name.endswith(".tar"))
    assert 20 <= n_opened <= 20 + 3 + 4


def test_nodes_that_share_shards_are_told_what_to_set(bucket, capsys):
    for world, lanes, batch, advice in (
        (4, "auto", 12, "data.lanes=4"),
        (4, 8, 8, ""),
        (3, 2, 12, "data.lanes=3"),
        (2, 4, 6, "data.lanes=2"),
        (1, 3, 8, ""),
        (4, 1, 12, ""),  # as it was asked for
    ):
        loader_of(data_of(remote(bucket), lanes=lanes), batch, rank=0, world=world)
        said = capsys.readouterr().err
        assert (advice in said) if advice else ("lanes" not in said)
