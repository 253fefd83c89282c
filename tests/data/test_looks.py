"""One look of each machine at local shards, for all of its ranks."""

import pathlib
import socket
from collections import Counter

import pytest

from tests import ranks
from tests.data.loopback_store import store
from tests.data.material import write_tar
from tests.data.test_index_file import PIXEL
from vlp import dist
from vlp.config import Captions
from vlp.data import looks
from vlp.data.sources import remote, shards
from vlp.plugin import Plugin


def opened(folder, hosts):
    """Of this rank: times that it asked for a shard's state, the fingerprint, the keys, and times
    with another look after the block.
    """
    if hosts is not None:
        socket.gethostname = lambda: hosts[dist.rank()]
    n_asked = 0
    stat = pathlib.Path.stat

    def counted(path, **options):
        nonlocal n_asked
        n_asked += path.suffix == ".tar"
        return stat(path, **options)

    pathlib.Path.stat = counted
    source = Plugin("vlp.data.sources", "shards", shards.Options(str(folder)))
    other = Plugin("vlp.data.sources", "webdataset", None)
    with looks.once_a_machine([other, source]):
        data = shards.open(source.options, Captions())
        n_inside = n_asked
    shards.open(source.options, Captions())
    return n_inside, data.fingerprint(), [data[i].key for i in range(len(data))], n_asked


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "with spaces"
    folder.mkdir()
    for number in range(3):
        members = [(f"k{number}.png", PIXEL), (f"k{number}.txt", b"one")]
        write_tar(folder / f"{number:05d}.tar", members)
    return folder


def test_of_a_machine_one_rank_asks_for_the_shards(folder):
    (n_asked, fingerprint, keys, _), of_other = ranks.run(2, opened, folder, None)
    # What was seen then is not believed later.
    assert n_asked >= 3 and of_other == (0, fingerprint, keys, 3)
    assert keys == ["k0", "k1", "k2"]


def test_each_machine_looks_for_itself(folder):
    """Ranks need not lie side by side; of two machines, one has a rank alone."""
    results = ranks.run(3, opened, folder, ["a", "b", "a"])
    assert [n_asked > 0 for n_asked, *_ in results] == [True, True, False]
    assert len({(fingerprint, *keys) for _, fingerprint, keys, _ in results}) == 1


def missing(folder):
    source = Plugin("vlp.data.sources", "shards", shards.Options(str(folder)))
    try:
        with looks.once_a_machine([source]):
            shards.open(source.options, Captions())
    except ValueError as error:
        return str(error)


def test_what_is_wrong_is_raised_on_every_rank(tmp_path):
    for text in ranks.run(2, missing, tmp_path / "nowhere"):
        assert "nowhere' is neither a folder nor a tar file" in text


def listed(path):
    """Of this rank: the keys of a remote source, or what is wrong with it."""
    source = Plugin("vlp.data.sources", "remote", remote.Options(path))
    try:
        with looks.once_a_machine([source]):
            data = remote.open(source.options, Captions())
    except ValueError as error:
        return str(error)
    return [data[i].key for i in range(len(data))]


def test_one_rank_asks_a_store_for_its_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    with store(tmp_path) as server:
        first, second = ranks.run(2, listed, f"{server.url}/with spaces/{{00000..00002}}.tar")
        assert first == second == ["k0", "k1", "k2"]
        # Once for the list, and once by whoever fetches a shard to index it.
        asked = Counter(request for request in server.requests if request.startswith("HEAD"))
        n_looks = [n for request, n in asked.items() if request.endswith(".tar")]
        for wrong in ranks.run(2, listed, f"{server.url}/9.tar"):
            assert "no shard at" in wrong
    assert n_looks == [2, 2, 2]
