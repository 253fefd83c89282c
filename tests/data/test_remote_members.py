"""Sounds and frames of shards in stores: they come with their shard, which is fetched once, and are
the same as from disk, through resuming and ranks.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import s3fs
import torch

from tests.data.loopback_store import store
from tests.data.material import encoded, picture, write_tar
from tests.data.test_member_index import N, member_loader, write
from tests.data.test_remote_protocols import s3
from tests.data.test_sounds import tone
from tests.loopback_hub import loopback_hub
from vlp.data import asking
from vlp.data.index import index
from vlp.data.member_file import NAME
from vlp.data.sources import _remote_members
from vlp.data.sources import shards as shard_files


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Six shards of two samples on a server, with an index and no file of members."""
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(asking, "_PAUSE_S", 0.001)
    index(sorted(write(tmp_path / "root" / "train", per_shard=2).glob("*.tar")))
    s3fs.S3FileSystem.clear_instance_cache()
    with store(tmp_path / "root") as running:
        yield running


def local(server) -> dict:
    """The same shards here, in the order that remote ones come in."""
    return {"name": "remote", "path": f"file://{server.root}/train/", "window": 2}


def http(server) -> dict:
    names = ",".join(f"{first:05d}" for first in range(0, N, 2))
    return {"name": "remote", "path": f"{server.url}/train/{{{names}}}.tar", "window": 2}


def of_hub(hub) -> dict:
    storage = {"endpoint": hub.url, "token": False}
    path = "hf://datasets/me/clips/train/"
    return {"name": "remote", "path": path, "window": 2, "storage": storage}


def tars(server) -> Counter[str]:
    return Counter({name: n for name, n in server.served.items() if name.endswith(".tar")})


@pytest.mark.parametrize("kind", [s3, pytest.param(http, marks=pytest.mark.slow)])
def test_members_come_with_their_shard_from_a_store(server, kind, tmp_path, monkeypatch):
    reference = [next(loader) for loader in [member_loader(local(server), 4)] for _ in range(6)]
    (tmp_path / "cache").rename(tmp_path / "of the reference")
    member_loader(Path(server.root, "train"))  # leaves its file beside the shards
    assert (server.root / "train" / NAME).exists()

    whole = member_loader(kind(server), 4)
    assert not tars(server), "the files beside the shards were enough"
    assert all(equal(next(whole), batch) for batch in reference)
    assert set(tars(server).values()) == {1} and len(tars(server)) == N // 2
    # What was read of members that lie before their picture counts as used.
    traffic = whole.traffic()
    assert 0.2 * traffic["fetched_bytes"] < traffic["used_bytes"]

    resumed = member_loader(kind(server), 4)
    resumed.load_state_dict(whole.state_dict(3))
    assert all(equal(next(resumed), batch) for batch in reference[3:])
    for rank in (0, 1):
        half = next(member_loader(kind(server), 4, rank=rank, world=2))
        rows = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(half.modalities, reference[0].modalities[rows])
        assert torch.equal(half.frames, reference[0].frames[rows])
    assert set(tars(server).values()) == {1}


def equal(one, other) -> bool:
    """Whether two batches hold the same; a modality may be lacking."""
    names = ("image", "frames", "modalities", "modality_lengths", "sample_id")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.slow
def test_members_come_with_their_shard_from_the_hub(server):
    reference = next(member_loader(local(server), 4))
    member_loader(Path(server.root, "train"))
    with loopback_hub() as hub:
        files = (server.root / "train").iterdir()
        hub.repos["me/clips"] = {f"train/{path.name}": path.read_bytes() for path in files}
        assert equal(next(member_loader(of_hub(hub), 4)), reference)


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_without_a_file_of_members_are_fetched_once_to_make_it(
    server, with_index, capsys, monkeypatch
):
    if not with_index:
        (server.root / "train" / "_index.bin").unlink()
    reference = next(member_loader(Path(server.root, "train")))
    (server.root / "train" / NAME).unlink()
    if not with_index:
        (server.root / "train" / "_index.bin").unlink()
    capsys.readouterr()

    found = member_loader(s3(server))
    told = f"6 of 6 shards have no {NAME}" if with_index else "6 of 6 shards have no index"
    assert told in capsys.readouterr().err
    # Whoever makes the index notes the members, too, whatever the cache keeps of the tars.
    assert set(tars(server).values()) == {1} and len(tars(server)) == 6
    monkeypatch.setattr(_remote_members, "of_shard", lambda *_: pytest.fail("walked again"))
    again = member_loader(s3(server))
    assert not capsys.readouterr().err
    by_key = dict(zip(reference.key, reference.modality_lengths.tolist(), strict=True))
    for loader in (found, again):
        batch = next(loader)
        assert dict(zip(batch.key, batch.modality_lengths.tolist(), strict=True)) == by_key
    assert not (server.root / "train" / NAME).exists()


def test_a_file_of_other_shards_is_not_used(server, capsys):
    """One that was left beside shards that were written anew."""
    member_loader(Path(server.root, "train"))
    train = server.root / "train"
    members = [("a.png", encoded(picture(1))), ("a.txt", b"a"), ("a.wav", tone(500, 0.1))]
    write_tar(train / "00000.tar", members)
    index(sorted(train.glob("*.tar")))
    assert next(member_loader(s3(server), N - 1)).modality_lengths.sum()
    assert "1 of 6 shards have no _members.bin" in capsys.readouterr().err


def test_members_outlive_a_copy_that_is_cleared_away(server, tmp_path):
    """Between the reading of a sample and of its members another process may make room."""
    loader = member_loader(s3(server))
    (source,) = loader.sources
    n_read = 0
    for i in range(N):
        sample = source[i]
        expected = [f.read(k) for f in sample.members.values() for k in range(len(f.members))]
        shutil.rmtree(tmp_path / "cache" / "shards")
        again = [f.read(k) for f in sample.members.values() for k in range(len(f.members))]
        assert again == expected
        n_read += len(expected)
        shard_files._Handle.cache_clear()
    assert n_read > N
