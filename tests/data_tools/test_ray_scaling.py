"""A call on a Ray cluster whose nodes come and go."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.data.material import encoded, picture
from tests.data_tools import ray_works
from tests.data_tools.ray_cluster import STORE, contents, joined
from tests.data_tools.tools import call
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools._run import cluster, on_ray
from vlp.data_tools._run.tries import TRIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_nodes_that_come_late_and_go_cost_a_shard_no_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The head has no core. Each node takes the first shard, and goes before it is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "LOOK_S", 0.5)
    monkeypatch.setattr(on_ray, "_NOTICE_S", 1)
    monkeypatch.setattr(on_ray, "_AGAIN_S", 1)
    with ShardWriter(Path("in"), 3) as writer:
        for i in range(6):
            writer.add(None, encoded(picture(i, (16, 16))), "png", ["a text"])
    options = ["--ocr", "tests.data_tools.ray_works:read_when_let", "--max-overlap", 0.5]
    n_lost = TRIES + 1

    # In a thread of its own: nodes are started by the main one.
    with ThreadPoolExecutor(1) as caller, joined(empty=True) as running:
        there = ["--to", "there", "--ray", running.address]
        tool = caller.submit(call, filtering, "in", *options, *there)
        time.sleep(5)
        for i in range(n_lost):
            node = running.cluster.add_node(num_cpus=1, **STORE)
            deadline = time.monotonic() + 30
            while len(ray_works.told(Path("log"))) <= i and not tool.done():
                assert time.monotonic() < deadline, "the node is given no shard"
                time.sleep(0.02)
            # As a machine that fails, and as one that is told to end.
            running.cluster.remove_node(node, allow_graceful=bool(i % 2))
        Path("leave").touch()
        running.cluster.add_node(num_cpus=1, **STORE)
        tool.result(ray_works.PATIENCE_S)
        told = capfd.readouterr().err
        n_begun = len(ray_works.told(Path("log")))
        places = {node for _, node, _ in ray_works.told(Path("log"))}
        call(filtering, "in", *options, "--to", "here", "--processes", 1)

    assert contents(Path("here")) == contents(Path("there")) and len(contents(Path("here"))) >= 5
    # One shard n_lost times and once more, then the other one.
    assert n_begun == n_lost + 2 and len(places) == n_lost + 1
    assert told.count("its shard begins anew") == n_lost
    # While there is no node yet it says so again and again.
    waits = "no room for a process yet: 2 tasks wait for a node with a core to spare (nodes now: 1"
    assert told.count(f"{waits}, lost meanwhile: 0)") >= 2, told
