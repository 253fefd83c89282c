"""Loader processes that die, trainers that die, and shared memory that is too small: with real
processes and real kills.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from tests.data.material import write_shards
from vlp.data import cores, processes
from vlp.data.processes import (
    Feed,
    check_shared_memory,
    fitting_workers,
    n_items_ahead,
    n_parts,
)
from vlp.data.steps import DataError

TRAINER = Path(__file__).with_name("trainer.py")
ROOT = Path(__file__).parents[2]


class Items(Dataset):
    """Item i after `seconds`; `fault` happens in the loader process at item `at`."""

    def __init__(self, seconds=0.0, fault="", at=0):
        self.seconds, self.fault, self.at = seconds, fault, at

    def __setstate__(self, state):
        self.__dict__ |= state
        if self.fault == "import":
            raise ImportError("no module named broken")

    def __getitem__(self, i):
        time.sleep(self.seconds)
        if i >= self.at and self.fault == "data":
            raise DataError("all samples are bad")
        if i >= self.at and self.fault == "bus":
            os.kill(os.getpid(), signal.SIGBUS)
        size = 4 << 20 if self.fault == "large" else 1
        return SimpleNamespace(number=torch.full((size,), i, dtype=torch.uint8)), None


def drain(feed, n=10**9, seconds=20.0):
    """Poll until n items came; fails after `seconds`."""
    end = time.monotonic() + seconds
    items = []
    while len(items) < n:
        assert time.monotonic() < end, "nothing was noticed"
        item = feed.poll()
        if item is not None:
            items.append(item)
    return items


@pytest.mark.parametrize(("n_before", "n_workers"), [(0, 1), (3, 2)])
def test_a_killed_loader_process_is_told_of_with_its_end_and_a_way_out(n_workers, n_before):
    feed = Feed(Items(seconds=0.0 if n_before else 60.0), 0, n_workers)
    assert [item[0].number.item() for item in drain(feed, n_before)] == list(range(n_before))

    for process in feed._iterator._workers:
        os.kill(process.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        drain(feed)  # what was already made may still come
    assert time.monotonic() - start < 10

    text = str(caught.value)
    assert ("before its first batch" in text) == (n_before == 0)

    for part in ("killed by SIGKILL", "memory", "data.workers"):
        assert part in text, text


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("import", ("before its first batch", "exit code 1", "stands above", "data.workers=0")),
        ("bus", ("bus error", "--shm-size", "data.workers=0", "train.batch")),
        ("data", ("all samples are bad",)),
    ],
)
def test_a_fault_in_a_loader_process_is_told_in_plain_words(fault, parts):
    with pytest.raises(DataError) as caught:
        drain(Feed(Items(fault=fault), 0, 1))
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_killed_trainer_leaves_no_process_behind(tmp_path):
    """Started in a folder whose files have the names of modules that the fork server imports."""
    for name in ("socket", "random", "json", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    n_workers = 2
    command = [sys.executable, str(TRAINER), str(n_workers)]
    trainer = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    server, *workers = map(int, trainer.stdout.readline().split())
    assert len(workers) == n_workers

    # A signal to the trainer's group passes them by.
    sessions = {os.getsid(pid) for pid in (server, *workers)}
    assert sessions == {server}
    assert os.getsid(trainer.pid) != server

    trainer.kill()
    trainer.wait()
    left = [psutil.Process(pid) for pid in (server, *workers) if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_shared_memory_is_checked_against_what_is_made_ahead(tmp_path):
    free = processes.shutil.disk_usage(tmp_path).free
    check_shared_memory(free // 10, 2, 1, tmp_path)  # 5 batches
    check_shared_memory(free, 0, 1, tmp_path)  # without loader processes nothing travels
    check_shared_memory(free, 2, 1, tmp_path / "absent")
    for n_ranks, batch in ((1, free // 4), (4, free // 10)):
        with pytest.raises(DataError) as caught:
            check_shared_memory(batch, 2, n_ranks, tmp_path)
        for part in (
            f"{n_ranks * 5} batches of",
            "free of",
            "--shm-size=",
            "data.workers=0",
            "train.batch",
        ):
            assert part in str(caught.value)


@pytest.mark.parametrize(
    ("free_mb", "batch_mb", "n_ranks", "expected", "parts"),
    [
        (300_000, 600, 1, 16, 16),
        (2_000, 600, 1, 16, 16),  # in parts, three batches whatever the number of processes
        (100, 20, 1, 2, 1),  # whole batches: two ahead of each process, and one
        (100, 5, 4, 2, 1),
        (64, 600, 1, 1, 1),  # Docker's, which holds no batch at all
    ],
)
def test_auto_takes_no_more_processes_than_the_shared_memory_holds(
    free_mb, batch_mb, n_ranks, expected, parts, tmp_path, monkeypatch
):
    free, batch = free_mb * 10**6, batch_mb * 10**6
    usage = SimpleNamespace(free=free, total=free)
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda folder: usage)

    n_workers = fitting_workers(batch, 4096, 16, n_ranks, tmp_path)
    assert (n_workers, n_parts(batch, n_workers, 4096)) == (expected, parts)
    if free > batch:
        check_shared_memory(batch, n_workers, n_ranks, tmp_path, parts)
        return
    with pytest.raises(DataError, match=r"64 MB free of 64 MB.*3 batches of 600 MB.*--shm-size=4g"):
        check_shared_memory(batch, n_workers, n_ranks, tmp_path, parts)


def test_shared_memory_is_bounded_however_many_processes_there_are():
    """By the batches ahead and the one that is joined where a batch is large; by a part's size each
    where it is small.
    """
    for batch_bytes in (600_000_000, 40_000_000, 1_000_000):
        for n_workers in range(1, 65):
            parts = n_parts(batch_bytes, n_workers, 4096)
            held = n_items_ahead(n_workers, parts, 1) * batch_bytes / parts
            n_items = n_items_ahead(n_workers, parts, 1)
            assert held <= max(3 * batch_bytes, n_items * processes._PART_BYTES)
    assert n_parts(600_000_000, 16, 3) == 3  # no part without a row


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "9900000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ],
)
def test_cores_are_those_of_the_affinity_and_the_quota(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(8)))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert cores.cores(tmp_path) == expected


def test_auto_leaves_a_core_of_each_rank_to_the_training_process(monkeypatch):
    expected = {(2, 1): 1, (1, 1): 1, (16, 1): 15, (16, 4): 3, (256, 2): 32, (8, 16): 1}
    for (n_cores, n_ranks), n_workers in expected.items():
        monkeypatch.setattr(cores, "cores", lambda n=n_cores: n)
        assert cores.usual_workers(n_ranks) == n_workers, (n_cores, n_ranks)


def test_shared_memory_that_runs_full_is_told_with_a_way_out(tmp_path):
    """In a mount namespace of its own, with 1 MiB of shared memory, as a batch of 4 MiB is handed
    over.
    """
    script = "from tests.data.test_processes import *; drain(Feed(Items(fault='large'), 0, 1))"
    mount = "mount -t tmpfs -o size=1m none /dev/shm"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    inner = f'{mount} && exec "$0" -c "$1"'
    command = ["unshare", "-rm", "sh", "-c", inner, sys.executable, script]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    for part in ("DataError", "/dev/shm (", "free of 1 MB", "--shm-size", "data.workers=0"):
        assert part in last, done.stderr[-2000:]


def test_a_loader_process_imports_no_model_library(tmp_path):
    """Each would cost every server of loader processes seconds, and a hundred megabytes."""
    folder = write_shards(tmp_path, 8, 8)
    command = [sys.executable, "-m", "tests.data.imported", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout)
    assert {"torch", "regex", "vlp.data.steps", "vlp.data.sources.shards"} <= {*modules}
    packages = {name.partition(".")[0] for name in modules}
    assert packages.isdisjoint({"open_clip", "transformers", "timm", "torchvision", "datasets"})
