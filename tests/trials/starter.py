"""Many short lives of the `vlp` command for trials that end them: each a fork of a process that has
only done the imports.

A life has a session of its own, its console goes to a file, and loader processes, locks and signals
are those of a real call. Starting one takes a tenth of a second; Python's imports would take six.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Life:
    """One started command: its processes by rank, and the files that their consoles went to."""

    starter: Starter
    pids: list[int]
    consoles: list[Path]

    def alive(self) -> bool:
        """Whether a rank still runs; one that ended waits as a zombie for `wait`."""
        return any(map(_runs, self.pids))

    def signal(self, signum: int, ranks: list[int] | None = None) -> None:
        """To each rank's whole session, as launchers and terminals do."""
        for rank, pid in enumerate(self.pids):
            if ranks is None or rank in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signum)

    def wait(self, timeout_s: float = 120) -> list[int]:
        """Exit codes by rank, negative for signals; what still runs after `timeout_s` fails."""
        return [self.starter.ask(wait=pid, timeout_s=timeout_s)["code"] for pid in self.pids]

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.consoles)

    def remains(self, within_s: float = 15) -> list[str]:
        """Processes of the life that are still there after `within_s`."""
        deadline = time.monotonic() + within_s
        while (left := self._session()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def loader_processes(self, rank: int = 0) -> list[int]:
        """The forkserver's children, which make the batches."""
        try:
            children = psutil.Process(self.pids[rank]).children()
            servers = [p for p in children if "forkserver" in " ".join(p.cmdline())]
            return [worker.pid for server in servers for worker in server.children()]
        except psutil.NoSuchProcess:
            return []

    def _session(self) -> list[str]:
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if _runs(process.pid) and os.getsid(process.pid) in self.pids:
                    left.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
        return left


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Starter:
    """The process that has done the imports. A context."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._n_lives = 0

    def __enter__(self) -> Starter:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # of a test that had ranks itself
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.trials.starter"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)

    def ask(self, **request: Any) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def start(self, *arguments: object, n_ranks: int = 1) -> Life:
        """`vlp ARGUMENTS…`, on `n_ranks` ranks with the environment that launchers set."""
        from tests.ranks import _free_port

        port, pids, consoles = _free_port(), [], []
        for rank in range(n_ranks):
            self._n_lives += 1
            console = self._folder / f"console_{self._n_lives:04d}.txt"
            environment = {} if n_ranks == 1 else _of_rank(rank, n_ranks, port)
            answer = self.ask(
                start=[str(a) for a in arguments], console=str(console), environment=environment
            )
            pids.append(answer["pid"])
            consoles.append(console)
        return Life(self, pids, consoles)


def _of_rank(rank: int, n_ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
    numbers |= {"MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


# ---- inside the process that forks


def serve() -> None:
    """Answer a JSON line from standard input with one on standard output, until the input ends."""
    import vlp.eval.evaluation
    import vlp.train  # noqa: F401 - the imports that every life would do

    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer = {"pid": _fork(request)}
        else:
            answer = _end_of(request["wait"], request["timeout_s"])
        print(json.dumps(answer), flush=True)


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    console = os.open(request["console"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (console, 1), (console, 2)):
        os.dup2(source, target)
    os.environ |= request["environment"]

    # A shell has what it starts in the background ignore Ctrl-C, and nohup a closed terminal: the
    # tests may run so, and a life would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    from vlp.cli import main

    code = main(request["start"])
    sys.stdout.flush()
    sys.stderr.flush()
    # `os._exit` would leave out what multiprocessing does at the end of a process.
    import atexit

    atexit._run_exitfuncs()
    os._exit(code)


def _end_of(pid: int, timeout_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"code": os.waitstatus_to_exitcode(status)}
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"error": f"process {pid} did not end within {timeout_s} s"}


if __name__ == "__main__":
    serve()
    # Taking all that was imported apart takes half a minute of a busy machine.
    os._exit(0)
