"""Processes that cannot be one run are refused where they meet, each with what to change."""

import os
import re
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tests import ranks
from vlp import dist, joining
from vlp.rendezvous import DECIDING, LaunchError, difference, meet

SHORT = timedelta(seconds=1)


def _join_with(port, folder, other):
    """What this rank is refused with. `other`: packages that rank 1's node has otherwise."""
    ranks.leave()
    os.environ["MASTER_PORT"] = str(port)
    if int(os.environ["RANK"]) == 1:
        for name, version in other.items():
            metadata = Path(folder) / f"{name}-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        sys.path.insert(0, folder)
    try:
        joining.join("cpu", timedelta(seconds=90))
    except LaunchError as error:
        torch.distributed.init_process_group("gloo")  # for the end of `ranks.run`
        return str(error)
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return None


def test_ranks_with_other_packages_are_refused_on_every_rank(tmp_path):
    other = {"numpy": "1.26.0", "vlp": "0.0.1"}
    said = ranks.run(2, _join_with, ranks._free_port(), str(tmp_path), other)
    assert said[0] == said[1]
    host = re.escape(socket.gethostname())
    assert re.search(rf"numpy is \S+ \(rank 0 on {host}\) and 1\.26\.0 \(rank 1 on", said[0])
    assert "vlp is " in said[0] and "torch" not in said[0] and "every node" in said[0]


def test_of_many_ranks_each_version_is_named_once():
    reports = [{"host": f"node{i // 8}"} | dict.fromkeys(DECIDING, "1.0") for i in range(24)]
    assert difference(reports) is None
    for report in reports[8:16]:
        report["numpy"] = "2.0"
    message = difference(reports)
    assert "numpy is 1.0 (16 ranks, the first is rank 0 on node0)" in message
    assert "and 2.0 (8 ranks, the first is rank 8 on node1)" in message and len(message) < 300


@pytest.fixture
def place(monkeypatch):
    def make(rank, port):
        values = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return make


def test_a_port_that_another_program_has_is_refused_with_the_options_that_choose_one(place):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place(0, port)
        with pytest.raises(LaunchError, match=rf"port {port} of this machine .* --standalone"):
            meet(SHORT)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"WORLD_SIZE announces 2 processes, and not all came: .* same number of nodes"),
        (1, r"rank 1 on \S+ does not reach the first rank at 127\.0\.0\.1:\d+ .* firewall"),
    ],
)
def test_ranks_that_never_come_are_named_with_the_address(place, rank, message):
    place(rank, ranks._free_port())
    with pytest.raises(LaunchError, match=message):
        meet(SHORT)


def _meet_twice(port):
    """The ranks of a second meeting, in the store that the first one left as it was."""
    ranks.leave()
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    limit = timedelta(seconds=90)
    torch.distributed.init_process_group("gloo", timeout=limit, **meet(limit))
    ranks.leave()

    # The other rank has then seen what there was.
    if not int(os.environ["RANK"]):
        time.sleep(0.3)
    torch.distributed.init_process_group("gloo", timeout=limit, **meet(limit))
    return dist.gather_objects(int(os.environ["RANK"]))


def test_ranks_that_are_started_anew_meet_in_the_store_of_those_that_went():
    """torchrun serves one store for all its restarts."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert ranks.run(2, _meet_twice, store.port) == [[0, 1], [0, 1]]


def test_ranks_of_tests_meet_where_no_connection_of_another_test_is_given_a_port():
    path = Path("/proc/sys/net/ipv4/ip_local_port_range")
    given_from = int(path.read_text().split()[0]) if path.exists() else 32_768
    ports = {ranks._free_port() for _ in range(50)}
    assert len(ports) > 40 and max(ports) < given_from
