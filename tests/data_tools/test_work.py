"""The common way over shards: processes, going on after a kill, parts of many machines, what goes
wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.data_tools import ray_works
from tests.data_tools.tools import CAPTIONS, call
from vlp.cli import _ended_by_signals
from vlp.data.format import ShardWriter
from vlp.data_tools import filter as filtering
from vlp.data_tools import negatives, reshard
from vlp.data_tools._run import local, progress, work
from vlp.data_tools._run.kept import Kept
from vlp.data_tools._run.tensors import as_bytes
from vlp.lifetime import Stopped, release_all


def write(folder: Path, n_shards: int, per_shard: int) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for i in range(n_shards * per_shard):
            writer.add(None, f"image {i}".encode(), "jpg", CAPTIONS[i % len(CAPTIONS)])
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.tar"))
    }


def times(paths: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in paths}


def test_a_killed_call_goes_on_and_leaves_no_process_behind(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", 16, 40), tmp_path / "out"
    command = [sys.executable, "-m", "vlp.cli", "data", "negatives", str(source)]
    command += ["--processes", "2", "--to"]
    tool = subprocess.Popen(
        [*command, str(out)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while (
        len(list(out.glob("0*_negatives.json"))) < 4
        and tool.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    workers = psutil.Process(tool.pid).children(recursive=True)
    os.kill(tool.pid, signal.SIGKILL)
    tool.wait()

    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "a process that outlives its parent would write what the next call writes"
    marks = list(out.glob("0*_negatives.json"))
    assert 4 <= len(marks) < 16, "the kill came too late to tell anything"
    tars = [out / f"{mark.name[:5]}.tar" for mark in marks]
    before = times(marks + tars)
    again = subprocess.run([*command, str(out)], capture_output=True, text=True, check=True)
    assert f"{len(marks)} of 16 shards are finished already" in again.stderr
    assert times(marks + tars) == before
    call(negatives, source, "--to", tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole") and len(digests(out)) == 16
    marks[0].unlink()  # negative control: a shard without its mark is made again
    call(negatives, source, "--to", out)
    changed = {name for name, now in times(marks + tars).items() if before[name] != now}
    assert changed == {marks[0].name, tars[0].name} and digests(out) == digests(tmp_path / "whole")


class EndsAtThird:
    """Work whose third job asks the call that made it to end."""

    def __init__(self, caller: int) -> None:
        self.caller = caller

    def __call__(self, item: int) -> work.Result:
        if item == 2:
            os.kill(self.caller, signal.SIGTERM)
            time.sleep(60)
        return {"counts": {"samples read": 1}}


def test_processes_wait_for_the_next_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With work and marks of its own; not those that were started with other settings."""

    def pids_of(round_: str) -> set[int]:
        folder = tmp_path / round_
        jobs = [work.Job(folder / f"{i}.json", i, 1) for i in range(4)]
        folder.mkdir()
        results = work.carry_out(round_, jobs, ray_works.Where(folder / "log", 2), work.Pool(2))
        assert len(list(folder.glob("*.json"))) == len(results) == 4
        return {result["pid"] for result in results if result is not None}

    monkeypatch.setenv("VLP_DECODE_LIMIT", "2")
    first = pids_of("one")
    assert len(first) == 2 and pids_of("two") == first

    # A lost one costs the next round nothing.
    os.kill(min(first), signal.SIGKILL)
    # psutil would take its exit code, for which the pool would then wait for ever.
    while min(first) in [child.pid for child in multiprocessing.active_children()]:
        time.sleep(0.01)
    second = pids_of("three")
    assert len(second) == 2 and not second & first

    release_all()
    _, alive = psutil.wait_procs(map(psutil.Process, filter(psutil.pid_exists, second)), 60)
    assert not alive


def test_an_error_that_no_process_can_read_is_sent_back_in_words() -> None:
    """A pool would take its process for lost, for want of memory."""
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(ray_works.CannotBeRead("http://here", 500)))
    with pytest.raises(OSError) as caught:
        local.sent_back(ray_works.fail_unreadably, 0)
    assert type(caught.value) is OSError and str(caught.value) == "http://here answers 500"

    # Negative control: what can be read comes as it is.
    with pytest.raises(ValueError, match="three is broken"):
        local.sent_back(ray_works.fail_at_three, 3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_call_that_is_asked_to_end_says_what_is_finished(tmp_path: Path, processes: int) -> None:
    jobs = [work.Job(tmp_path / f"{i}.json", i, 1) for i in range(6)]
    ends = EndsAtThird(os.getpid())

    def run(args: argparse.Namespace) -> int:
        work.carry_out("count", jobs, ends, work.Pool(processes))
        return 0

    started, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        _ended_by_signals(run)(argparse.Namespace())
    n_finished = sum(job.mark.exists() for job in jobs)
    assert 1 <= n_finished < 6 and time.monotonic() - started < 50
    assert str(stopped.value) == (
        f"ended by SIGTERM; count: {n_finished} of 6 shards are finished and stay; the same "
        "command goes on with the others"
    )
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in", 12, 200), tmp_path / "out"
    rng = random.Random(0)
    n_kills = 0
    options = [str(source), "--samples-per-shard", "25", "--shuffle", "0", "--processes", "3"]

    def finished() -> int:
        return len(list(out.glob("0*_reshard.json")))

    while True:
        enough = finished() + rng.randint(1, 12)
        tool = subprocess.Popen(
            [sys.executable, "-m", "vlp.cli", "data", "reshard", *options, "--to", str(out)]
        )
        while tool.poll() is None and finished() < enough:
            time.sleep(0.002)
        if tool.poll() is not None:
            break
        tool.kill()
        tool.wait()
        n_kills += 1

    assert tool.returncode == 0 and n_kills >= 4
    call(reshard, *options[:-2], "--to", tmp_path / "whole")
    assert digests(out) == digests(tmp_path / "whole") and len(digests(out)) == 96
    assert not list(out.glob(".*.tar.tmp"))


def test_the_parts_of_two_machines_are_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    source, options = write(tmp_path / "in", 5, 6), ("--min-words", 3, "--max-repeats", 9)
    call(filtering, source, "--to", tmp_path / "whole", *options)
    whole = capsys.readouterr().out.split("\n", 1)[1]
    out = tmp_path / "parts"
    for rank in (
        "0",
        "1",
        "0",
        "1",
    ):  # two calls each, because repeats are counted before anything is written
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv("SLURM_NTASKS", "2")
        call(filtering, source, "--to", out, *options)
        told = capsys.readouterr()
        assert f"part {int(rank) + 1} of 2 is {3 - int(rank)} of 5 shards" in told.err
        assert ("unfinished" in told.err) == (not (out / "_index.bin").exists()), (
            "only the last one finds all shards finished"
        )
    assert told.out.split("\n", 1)[1] == whole
    assert digests(out) == digests(tmp_path / "whole") and len(digests(out)) == 5
    # The option goes before the rank.
    call(filtering, source, "--to", tmp_path / "half", "--min-words", 3, "--part", "1/2")
    assert sorted(digests(tmp_path / "half")) == ["00000.tar", "00002.tar", "00004.tar"]


@pytest.mark.parametrize(
    "part, environment, expected",
    [
        (None, {}, (1, 1)),
        ("3/8", {"RANK": "0", "WORLD_SIZE": "2"}, (3, 8)),
        (None, {"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "5", "SLURM_NTASKS": "6"}, (2, 2)),
        (None, {"RANK": "1"}, (1, 1)),
        ("0/2", {}, None),
        ("3/2", {}, None),
        ("1", {}, None),
        ("a/b", {}, None),
        ("", {"RANK": "2", "WORLD_SIZE": "2"}, None),
        ("", {"SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, None),
    ],
)
def test_who_takes_which_part(
    monkeypatch: pytest.MonkeyPatch, part: str, environment: dict, expected: tuple | None
) -> None:
    for name in (name for names in work.RANKS for name in names):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(part=part, processes=1, ray=None)
    if expected is None:
        with pytest.raises(ValueError, match="names no part of the shards; expected --part K/N"):
            work.pool(args)
    else:
        pool = work.pool(args)
        assert (pool.part, pool.parts) == expected


def test_every_job_is_one_machine_s() -> None:
    jobs, n = list(range(17)), 0
    for parts in range(1, 20):
        taken = [
            job
            for part in range(1, parts + 1)
            for job in work.Pool(part=part, parts=parts).share(jobs)
        ]
        assert sorted(taken) == jobs
        n += 1
    assert n == 19


def end_at_three(number: int) -> work.Result:
    if number == 3:
        os._exit(9)
    return {"counts": {"samples read": 1}}


def fail_at_three(number: int) -> work.Result:
    if number == 3:
        raise ValueError("three is broken")
    return {"counts": {"samples read": 1}}


@pytest.mark.parametrize(
    "task, processes, error, message",
    [
        (end_at_three, 2, work.WorkerLost, "fewer --processes"),
        (fail_at_three, 2, ValueError, "three is broken"),
        (fail_at_three, 1, ValueError, "three is broken"),
    ],
)
def test_a_failure_ends_the_call_and_keeps_what_is_finished(
    tmp_path: Path, task, processes, error, message
) -> None:
    jobs = [work.Job(tmp_path / f"{i}.json", i, 1) for i in range(6)]
    with pytest.raises(error, match=message):
        work.carry_out("test", jobs, task, work.Pool(processes))
    finished = {path.stem for path in tmp_path.glob("*.json")}
    assert "3" not in finished and finished >= ({"0", "1", "2"} if processes == 1 else set())
    assert all(
        json.loads(path.read_text())["counts"] == {"samples read": 1}
        for path in tmp_path.glob("*.json")
    )


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "{}", '{"counts": 3}'])
def test_a_damaged_mark_is_named(tmp_path: Path, content: str) -> None:
    jobs = [work.Job(tmp_path / f"{i}.json", i, 1) for i in range(3)]
    work.carry_out("test", jobs, fail_at_three, work.Pool())
    jobs[1].mark.write_text(content)
    with pytest.raises(ValueError, match=r"1\.json (is damaged|holds no counts).*delete it"):
        work.carry_out("test", jobs, fail_at_three, work.Pool())

    jobs[1].mark.unlink()
    results = work.carry_out("test", jobs, fail_at_three, work.Pool())
    assert work.total(results) == {"samples read": 3}


def test_progress_tells_shards_throughput_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    clock = iter([0.0, 2.0, 8.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    jobs = [work.Job(tmp_path / f"{i}.json", i, size) for i, size in enumerate((10, 30, 60))]
    work.carry_out("test", jobs, fail_at_three, work.Pool())
    assert capsys.readouterr().err.splitlines() == [
        "test: 1/3 shards, 1 samples, 0/s, 0:18 left",  # a tenth of the bytes in two seconds
        # eight seconds after the first line was too soon for another
        "test: 3/3 shards, 3 samples, 0/s, took 0:20",
    ]


def test_processes_must_be_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--processes 0 must be at least 1"):
        call(negatives, write(tmp_path / "in", 1, 2), "--to", tmp_path / "out", "--processes", 0)


def test_a_mark_does_not_depend_on_the_order_of_counting(tmp_path: Path) -> None:
    jobs = [work.Job(tmp_path / f"{i}.json", names, 1) for i, names in enumerate(("ab", "ba"))]
    counted = [{"counts": Counter(names)} for names in ("ab", "ba")]
    assert [*counted[0]["counts"]] != [*counted[1]["counts"]]
    work.carry_out("test", jobs, lambda names: {"counts": Counter(names)}, work.Pool())
    assert jobs[0].mark.read_bytes() == jobs[1].mark.read_bytes()


def test_tensors_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save

    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(1, dtype=torch.float16)}
    metadata = {f"name {i}": f"ö{i}" for i in range(9)}
    written = {as_bytes(tensors, metadata) for _ in range(5)}
    assert len(written) == 1
    # Negative control: the library's own order.
    assert len({save(tensors, metadata) for _ in range(5)}) > 1

    path = tmp_path / "0.safetensors"
    path.write_bytes(written.pop())
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in ("a", "b"))


def test_two_writers_of_one_shard_write_it_whole(tmp_path: Path) -> None:
    """A process that was taken for lost goes on beside the one that does its shard again."""
    alone = write(tmp_path / "alone", 1, 6)
    writers = [ShardWriter(tmp_path / "two", 6, overwrite=True) for _ in range(2)]
    for i in range(6):
        for writer in writers:
            writer.add(None, f"image {i}".encode(), "jpg", CAPTIONS[i % len(CAPTIONS)])
    for writer in writers:
        writer.__exit__(None, None, None)
    assert digests(tmp_path / "two") == digests(alone) and len(digests(alone)) == 1
    assert not list((tmp_path / "two").glob(".*"))


def test_kept_values_stay_what_they_first_were(tmp_path: Path) -> None:
    """A hash in a second batch is computed with that batch, and keeps its first value; so it does
    for a call that reads the file, of which the end was torn off.
    """
    n_computed = 0

    def compute(batch: list[str]) -> list[int]:
        nonlocal n_computed
        n_computed += 1
        return [n_computed] * len(batch)

    path = tmp_path / "kept" / "0.jsonl"
    kept = Kept(path)
    kept.complete(["a", "b", "c"], 2, compute)
    kept.complete(["d", "a"], 2, compute)
    assert kept.values == {"a": 1, "b": 1, "c": 2, "d": 3}

    path.write_text(path.read_text()[:-3])
    again = Kept(path)
    assert again.values == {"a": 1, "b": 1, "c": 2}
    n_computed = 2
    again.complete(["a", "b", "c"], 2, compute)
    again.complete(["d", "a"], 2, compute)
    assert again.values == kept.values == Kept(path).values
