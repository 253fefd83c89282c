"""Which device a process takes, what is refused before anything long, and who waits how long."""

import os
import re
import time
from datetime import timedelta

import pytest
import torch

from tests import ranks
from tests.test_train import ROOT
from vlp import dist, engines, joining
from vlp.config import Duration, Train
from vlp.joining import LaunchError, local_device

LIMIT_S = 3.0  # of exchanges, in the tests of waiting; joining must be possible in it, too


@pytest.fixture
def machine(monkeypatch):
    """A process as a launcher starts it, on a machine with so many GPUs."""

    def make(n_gpus, local_rank=None, n_local=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        for name, value in (("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", n_local)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return make


@pytest.mark.parametrize(
    ("name", "place", "expected"),
    [
        ("auto", (0,), "cpu"),
        ("auto", (1,), "cuda:0"),
        ("auto", (8, 5, 8), "cuda:5"),
        ("cuda", (8, 5, 8), "cuda:5"),
        ("cuda", (8, 1, 2), "cuda:1"),
        ("cpu", (8, 5, 8), "cpu"),
        ("cuda:3", (8,), "cuda:3"),
    ],
)
def test_each_rank_takes_the_gpu_of_its_local_rank(machine, name, place, expected):
    machine(*place)
    assert local_device(name) == expected


@pytest.mark.parametrize(
    ("name", "place", "parts"),
    [
        ("cuda", (0,), ("torch sees no CUDA device", "use auto or cpu")),
        ("auto", (1, 0, 8), ("8 processes", "LOCAL_WORLD_SIZE", "1 GPU", "--nproc-per-node 1")),
        ("cuda", (4, 5, 8), ("8 processes", "4 GPU", "CUDA_VISIBLE_DEVICES is")),
        ("cuda", (2, 2), ("3 processes", "2 GPU")),
        ("cuda:1", (8, 0, 8), ("8 processes", "use cuda,")),
    ],
)
def test_gpus_that_do_not_fit_the_processes_are_refused(machine, name, place, parts):
    machine(*place)
    with pytest.raises(LaunchError) as caught:
        local_device(name)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_tools_that_work_alone_may_share_a_gpu(machine):
    machine(2, local_rank=5, n_local=8)
    assert [local_device(name, shared=True) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1", "cuda:1", "cuda:0", "cpu",
    ]  # fmt: skip


def test_training_refuses_a_machine_with_too_few_gpus(machine):
    machine(1, local_rank=0, n_local=2)
    with pytest.raises(LaunchError, match=r"2 processes on this machine .* sees 1 GPU"):
        engines.start(Train(Duration(2, "steps"), 8))


def test_gpus_without_nccl_are_refused(machine, monkeypatch):
    machine(2, local_rank=1, n_local=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(LaunchError, match=r"several processes on cuda:1 talk by NCCL, .* lacks"):
        joining.join("cuda:1")


def test_one_function_chooses_devices():
    """Elsewhere a rank would take the first GPU."""
    chosen_elsewhere = []
    files = [path for room in ("vlp", "eval", "data_tools") for path in (ROOT / room).rglob("*.py")]
    for path in files:
        text = path.read_text()
        if path.name != "joining.py" and re.search(r'"cuda" if torch|f"cuda:|LOCAL_RANK"', text):
            chosen_elsewhere.append(path.relative_to(ROOT).as_posix())
    assert len(files) > 200
    # One reads the variable for `local_device`, the other checks that the launcher has set it.
    assert set(chosen_elsewhere) == {"vlp/groups.py", "vlp/engines/processes.py"}


def _late(port, by_exchange):
    """Rank 0 works longer than an exchange may take; the seconds that this rank waited."""
    ranks.leave()
    os.environ["MASTER_PORT"] = str(port)
    joining.join("cpu", timedelta(seconds=LIMIT_S))

    started = time.monotonic()
    if dist.is_main():
        time.sleep(1.5 * LIMIT_S)
    if by_exchange:
        dist.all_reduce(torch.ones(1), dist.world())
    else:
        dist.await_all("the first rank")
        assert dist.broadcast_object(dist.rank()) == 0
    return time.monotonic() - started


def test_ranks_wait_longer_for_one_that_works_than_for_an_exchange():
    waited_s = ranks.run(2, _late, ranks._free_port(), False)
    assert len(waited_s) == 2 and min(waited_s) >= 1.4 * LIMIT_S


def _said_while_waiting(port):
    ranks.leave()
    os.environ["MASTER_PORT"] = str(port)
    joining.join("cpu")
    dist._SAY_EVERY_S = 0.5
    said = []
    dist.log.warn = said.append
    if dist.is_main():
        time.sleep(LIMIT_S)
    dist.await_all("the first rank")
    return said


def test_a_rank_that_waits_says_for_what():
    first, second = ranks.run(2, _said_while_waiting, ranks._free_port())
    assert not first and set(second) == {"waiting for the first rank since 0 min"}


def test_an_exchange_has_a_limit():
    # Of two ranks the one whose neighbour gave up may be the first to say so.
    with pytest.raises(RuntimeError, match=r"[Tt]imed out|[Cc]onnection (closed|reset) by peer"):
        ranks.run(2, _late, ranks._free_port(), True)
