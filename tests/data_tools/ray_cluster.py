"""A Ray cluster of two nodes on this machine, and what tests of it compare."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.data_tools.ray_works import PATIENCE_S
from tests.data_tools.tools import call
from vlp.data_tools._run import cluster, work

ON_RAY = work.Pool(None, ray=True)
STORE = {"object_store_memory": 80_000_000, "include_dashboard": False}
# Two processes less, which would tell of logs and start machines.
ALONE = {"include_log_monitor": False, "no_monitor": True}
# A lost node is missed after a second; Ray's own default is fifteen.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 300,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A cluster on this machine: a head, and a node that has a GPU by its own account; or a head
    alone without a core, as one that scales begins.
    """

    def __init__(self, *, empty: bool = False) -> None:
        from ray.cluster_utils import Cluster

        n_cores = 0 if empty else 1
        head = {"num_cpus": n_cores, "_system_config": HEALTH, **ALONE, **STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            if not empty:
                self.second = self.cluster.add_node(num_cpus=1, num_gpus=1, **STORE)
        except BaseException:
            self.end()
            raise

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def lose_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    @contextmanager
    def losing_second(self, folder: Path, marks: str, n: int) -> Iterator[None]:
        """Around a call: once `folder` holds `n` files of such names the second node is lost; there
        is another one afterwards.
        """

        def lose() -> None:
            deadline = time.monotonic() + PATIENCE_S
            while len(list(folder.glob(marks))) < n and time.monotonic() < deadline:
                time.sleep(0.005)
            self.lose_second()

        thread = threading.Thread(target=lose)
        thread.start()
        try:
            yield
        finally:
            thread.join()
            self.second = self.cluster.add_node(num_cpus=1, num_gpus=1, **STORE)

    def end(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


@contextmanager
def joined(*, empty: bool = False) -> Iterator[Nodes]:
    """A cluster as `Nodes` says, which this process has joined. Nothing of it stays."""
    on_sigterm = signal.getsignal(signal.SIGTERM)
    # Short, because sockets lie in it.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    settings = {
        # Ray would note this cluster as the machine's, in the place of one that somebody has begun.
        "RAY_TMPDIR": folder,
        # Else it would write a token into the home of whoever tests.
        "RAY_AUTH_MODE": "disabled",
        # It would report its use.
        "RAY_USAGE_STATS_ENABLED": "0",
        # It names its own debugger here, which would stay.
        "PYTHONBREAKPOINT": "",
        "VLP_DECODE_LIMIT": "2",
    }
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in settings.items():
                environment.setenv(name, value)
            environment.delenv("RAY_ADDRESS", raising=False)
            made = Nodes(empty=empty)
            try:
                cluster.connect(made.address)
                yield made
            finally:
                made.end()
    finally:
        # Each node that is started here puts an answer of its own in the place of ours.
        signal.signal(signal.SIGTERM, on_sigterm)
        shutil.rmtree(folder, ignore_errors=True)


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody waits for is left as a zombie."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def jobs(folder: Path, n: int) -> list[work.Job]:
    return [work.Job(folder / f"{i}.json", i, 1) for i in range(n)]


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the index, which holds times."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name != "_index.bin"
    }


def same_on_ray(tool: Any, options: list[Any], source: str, address: str) -> None:
    """Run a tool here and on the cluster, from one folder, and compare all that is written."""
    call(tool, source, *options, "--to", "here")
    options = [option for option in options if option not in ("--processes", 1)]
    call(tool, source, *options, "--to", "there", "--ray", address)
    here, there = contents(Path("here")), contents(Path("there"))
    assert here.keys() == there.keys() and len(here) >= 3
    differing = [name for name in here if here[name] != there[name]]
    assert not differing, f"{tool.__name__} {options}: {differing}"
    shutil.rmtree("here")
    shutil.rmtree("there")
