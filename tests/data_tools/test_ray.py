"""Tools on a Ray cluster of two nodes: what they write, what a lost node costs, what is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.data_tools import ray_works
from tests.data_tools.ray_cluster import ON_RAY, Nodes, jobs, joined, lives, same_on_ray
from tests.data_tools.test_work import EndsAtThird, write
from tests.data_tools.tools import call
from vlp.cli import _data, _ended_by_signals
from vlp.data_tools import filter as filtering
from vlp.data_tools import scenes, stats
from vlp.data_tools._run import cluster, nodes, on_ray, tries, waiting, work
from vlp.lifetime import Stopped


@pytest.fixture(scope="module")
def running() -> Iterator[Nodes]:
    with joined() as made:
        yield made


def test_a_tool_writes_the_same_bytes_on_a_cluster(
    running: Nodes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In two rounds, the second on what the first has found. With relative paths, which nodes that
    were started elsewhere would look for elsewhere. All tools: `test_ray_trials`.
    """
    monkeypatch.chdir(tmp_path)
    write(Path("the input"), 4, 6)
    rules = ["--min-words", 3, "--max-repeats", 9]
    same_on_ray(filtering, rules, "the input", running.address)

    # All that Ray has to say is said elsewhere.
    told = capfd.readouterr()
    assert "ray" not in (told.out + told.err).lower().replace("/--ray", "")


def test_every_tool_runs_on_a_cluster_and_the_guide_says_how() -> None:
    parser = argparse.ArgumentParser()
    _data(parser)
    [tools] = [action for action in parser._actions if action.choices]
    told = (Path(__file__).parents[2] / "docs" / "guides" / "ray.md").read_text()
    table = told.partition("| tool | on Ray |")[2].partition("\n\n")[0]
    for name, tool in tools.choices.items():
        assert "--ray" in tool.format_help(), name
        assert f"`{name}`" in table, name
    assert len(tools.choices) >= 19


def test_a_process_is_given_a_gpu_and_many_items(
    running: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = ray_works.Where(tmp_path / "log", 1)
    results = work.carry_out("gpu", jobs(tmp_path, 6), alone, ON_RAY.of_model("auto"))
    # A model is loaded once: one process on the one GPU does all.
    about = {(r["pid"], r["gpus"], r["folder"], r["limit"]) for r in results if r is not None}
    assert len(about) == 1
    ((pid, gpus, folder, limit),) = about
    assert (gpus, folder, limit) == ("0", str(tmp_path), "2") and pid != os.getpid()

    # Negative control: work without a model goes to both nodes, and sees no GPU.
    (tmp_path / "cpu").mkdir()
    together = ray_works.Where(tmp_path / "cpu" / "log", 2)
    results = work.carry_out("cpu", jobs(tmp_path / "cpu", 12), together, ON_RAY)
    about = {(r["pid"], r["gpus"]) for r in results if r is not None}
    assert len({pid for pid, _ in about}) == 2 and {gpus for _, gpus in about} == {""}


def test_processes_wait_for_the_next_round(
    running: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a model is loaded once a call. The next round's work, and marks, are its own."""

    def pids_of(round_: str, limit: str) -> set[int]:
        folder = tmp_path / round_
        folder.mkdir()
        both = ray_works.Where(folder / "log", 2)
        results = work.carry_out(round_, jobs(folder, 6), both, ON_RAY)
        about = [result for result in results if result is not None]
        assert {result["limit"] for result in about} == {limit}
        assert len(about) == len(list(folder.glob("*.json"))) == 6
        return {result["pid"] for result in about}

    first = pids_of("one", "2")
    assert len(first) == 2 and pids_of("two", "2") == first

    # A lost one costs the next round nothing.
    os.kill(min(first), signal.SIGKILL)
    second = pids_of("three", "2")
    assert second & first == {max(first)} and len(second) == 2

    # Who was started with other settings is not taken, and nobody waits for long.
    monkeypatch.setattr(waiting, "KEPT_S", 0.2)
    monkeypatch.setenv("VLP_DECODE_LIMIT", "7")
    third = pids_of("four", "7")
    assert len(third) == 2 and not third & (first | second)
    deadline = time.monotonic() + ray_works.PATIENCE_S
    while any(map(lives, third | second)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, third | second))


def test_an_error_of_the_work_comes_as_it_is(running: Nodes, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        work.carry_out("test", jobs(tmp_path, 6), ray_works.fail_at_three, ON_RAY)
    assert type(caught.value) is ValueError and str(caught.value) == "three is broken"
    assert not (tmp_path / "3.json").exists() and not list(tmp_path.glob(".*"))

    # Also one that cannot be unpickled: its words are there.
    with pytest.raises(OSError) as unreadable:
        work.carry_out("test", jobs(tmp_path / "other", 1), ray_works.fail_unreadably, ON_RAY)
    assert str(unreadable.value) == "http://here answers 500"

    # The same call goes on, and does no finished job again.
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    results = work.carry_out("test", jobs(tmp_path, 3), ray_works.fail_at_three, ON_RAY)
    assert work.total(results) == {"samples read": 3}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


@pytest.mark.slow
@pytest.mark.parametrize("n_tries", [1, 3])
def test_an_item_is_begun_so_many_times(
    running: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tries: int
) -> None:
    """A process that ends without a word, twice: the item is begun three times, unless nobody
    tries again.
    """
    monkeypatch.setattr(tries, "TRIES", n_tries)
    ends = ray_works.EndsItself(tmp_path / "log", at=1, times=2)
    if n_tries == 1:
        with pytest.raises(work.WorkerLost, match=r"1 processes ended.*fewer --processes"):
            work.carry_out("test", jobs(tmp_path, 3), ends, ON_RAY)
        return

    results = work.carry_out("test", jobs(tmp_path, 3), ends, ON_RAY)
    assert work.total(results) == {"samples read": 3}
    assert sum(words == ["1"] for words in ray_works.told(tmp_path / "log")) == 3


@pytest.mark.slow
def test_a_signal_ends_the_call_with_the_same_words(running: Nodes, tmp_path: Path) -> None:
    ends = EndsAtThird(os.getpid())

    def run(args: argparse.Namespace) -> int:
        work.carry_out("count", jobs(tmp_path, 6), ends, ON_RAY)
        return 0

    started, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        _ended_by_signals(run)(argparse.Namespace())
    n_finished = sum(job.mark.exists() for job in jobs(tmp_path, 6))
    assert 1 <= n_finished < 6 and time.monotonic() - started < 50
    assert str(stopped.value) == (
        f"ended by SIGTERM; count: {n_finished} of 6 shards are finished and stay; the same "
        "command goes on with the others"
    )
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_node_is_asked_for_its_versions(running: Nodes) -> None:
    import ray

    of_nodes = cluster.versions_of_nodes(ray)
    assert len(of_nodes) == 2
    assert all(versions == nodes.versions() for versions in of_nodes.values())
    assert {"python", "vlp", "torch", "pillow"} <= nodes.versions().keys()


def test_a_node_that_is_lost_in_mid_run_costs_its_shard_nothing(
    running: Nodes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Last in this file: the cluster has one node afterwards."""
    log, leave = tmp_path / "log", tmp_path / "leave"
    lost = running.second.node_id

    def lose() -> None:
        # Both nodes have begun an item, and neither can finish.
        deadline = time.monotonic() + ray_works.PATIENCE_S
        while len(ray_works.told(log)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        running.lose_second()

        # A process outlives its node's daemon for a moment, in which it could finish.
        (pid,) = (int(pid) for _, node, pid in ray_works.told(log) if node == lost)
        while lives(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        leave.touch()

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        waits = ray_works.WaitsForLeave(log, leave)
        results = work.carry_out("slow", jobs(tmp_path, 6), waits, ON_RAY)
    finally:
        thread.join()

    begun = ray_works.told(log)
    (number,) = (number for number, node, _ in begun if node == lost)
    places = [node for begun_number, node, _ in begun if begun_number == number]
    assert len(places) == 2 and places[0] == lost != places[1]
    assert len(begun) == 7
    assert [result and result["counts"] for result in results] == [
        {"samples read": i} for i in range(6)
    ]
    told = capfd.readouterr()
    assert "a process was lost, with its node or alone; its shard begins anew" in told.err
    assert "raylet" not in told.out + told.err

    with pytest.raises(nodes.ClusterError, match="no node of the cluster has a GPU"):
        ON_RAY.of_model("cuda")


def test_a_process_is_lost_by_many_names() -> None:
    """Of an error of the work, of Ray, and of nobody's."""
    from ray import exceptions

    workers = on_ray._Workers(sys.modules["ray"], nodes.Call("", {}, [], {}, [], {}), None, {}, 1)
    names: list[BaseException] = [
        exceptions.ActorDiedError(),
        exceptions.OutOfMemoryError("the node was running low on memory"),
        exceptions.NodeDiedError("gone"),
        exceptions.ObjectLostError("0", None, ""),
    ]
    n = 0
    for error in names:
        future: Future[str] = Future()
        future.set_exception(error)
        assert workers._is_lost(future), error
        n += 1
    assert n == 4

    ours: Future[str] = Future()
    ours.set_exception(KeyError("ours"))
    with pytest.raises(KeyError):
        workers._is_lost(ours)


def test_the_cluster_of_this_machine_is_that_which_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ray notes it. An empty RAY_ADDRESS is none."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert cluster._place("auto") is None

    from ray._private.utils import write_ray_address

    (tmp_path / "ray").mkdir()
    write_ray_address("10.0.0.1:6379")
    assert cluster._place("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster._place("auto") == "10.0.0.2:6379"
    assert cluster._place("10.0.0.3:6379") == "10.0.0.3:6379" and cluster._place("local") is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ray", "--part", "1/2"], "--part 1/2 and --ray.*leave one of them out"),
        (["--ray", "somewhere"], "--ray somewhere: expected HOST:PORT"),
        (["--ray", "ray://head:10001"], "expected HOST:PORT of a cluster that this machine"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1 .*ray start --head"),
    ],
)
def test_what_is_typed_wrongly_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    source = write(tmp_path / "in", 1, 2)
    with pytest.raises(ValueError, match=message):
        call(stats, source, "--to", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something else listens there.*6379"),
        (b"", "something else listens there"),
        (None, "no Ray cluster answers at .*timed out.*ray start --head"),
    ],
)
def test_a_port_of_something_else_is_refused_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, message: str
) -> None:
    """Of a dashboard, of what hangs up, and of what is silent: Ray would try for minutes."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.3)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)

    def listen() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            if answer is None:
                said.wait(ray_works.PATIENCE_S)
            else:
                connection.sendall(answer)

    said = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        source = write(tmp_path / "in", 1, 2)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(nodes.ClusterError, match=message):
            call(stats, source, "--to", tmp_path / "out", "--ray", address)
        said.set()
        thread.join()
    assert not (tmp_path / "out").exists()


def test_without_ray_the_line_that_installs_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for tool in (stats, scenes):
        source = [write(tmp_path / "in", 1, 2)] if tool is stats else []
        with pytest.raises(ValueError, match=r"pip install 'vlp\[ray\]'"):
            call(tool, *source, "--to", tmp_path / "out", "--ray")


def test_nodes_of_other_versions_are_named() -> None:
    here = {"python": "3.11", "vlp": "0.1.0 (code 1)", "torch": "2.15.0"}
    nodes.refuse_differing(here, {"node a": dict(here)})
    of_nodes = {"node a": here, "node b": {**here, "vlp": "0.0.9 (code 2)"}, "node c": {}}
    with pytest.raises(nodes.ClusterError) as caught:
        nodes.refuse_differing(here, of_nodes)
    assert "node b: vlp 0.0.9 (code 2) (here 0.1.0 (code 1)); node c: python missing" in str(
        caught.value
    )
    assert "node a" not in str(caught.value)


class InAStore(type(Path())):  # type: ignore[misc]  # the kind of this system
    """As a path to an object of a store is."""


def test_paths_of_the_system_are_found_in_what_is_sent(tmp_path: Path) -> None:
    job = work.Job(tmp_path / "0.json", (0, tmp_path / "0.tar"), 1)
    data, paths = nodes.pickled([job, {"a": {tmp_path}}, InAStore("s3://bucket/0.tar"), "a/b"])
    assert paths == [job.mark, tmp_path / "0.tar", tmp_path]
    assert pickle.loads(data)[0] == job


def test_what_a_node_does_not_see_is_named(tmp_path: Path) -> None:
    shards = [tmp_path / "in" / f"{i}.tar" for i in range(3)]
    shards[0].parent.mkdir()
    for path in shards:
        path.touch()
    (tmp_path / "out").mkdir()
    marks = [tmp_path / "out" / f"{i}.json" for i in range(3)]
    with nodes.call([*shards, *marks]) as call_:
        assert call_.inputs == [shards[0]] and call_.missing() == ""
        (token,) = call_.outputs.values()
        assert token.parent == tmp_path / "out" and token.exists()

        # A folder of that name is there, and empty, as where a mount is missing.
        shards[0].rename(tmp_path / "elsewhere.tar")
        assert call_.missing() == f"does not see {shards[0]}"
        (tmp_path / "elsewhere.tar").rename(shards[0])
        token.unlink()
        assert call_.missing() == f"does not see {tmp_path / 'out'}"
    assert not list((tmp_path / "out").iterdir())
