"""Work for the processes of a cluster, in a file that imports little: each of them reads it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.data_tools._run import work

PATIENCE_S = 100


def told(log: Path) -> list[list[str]]:
    """The words of each line that works have written."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def tell(log: Path, *words: object) -> None:
    """Add a line in one write: several processes have the file open."""
    with open(log, "a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@dataclass(frozen=True)
class WaitsForLeave:
    """Work that says where it began, and goes on once a file is there."""

    log: Path
    leave: Path

    def __call__(self, number: int) -> work.Result:
        import ray

        tell(self.log, number, ray.get_runtime_context().get_node_id(), os.getpid())
        deadline = time.monotonic() + PATIENCE_S
        while not self.leave.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return {"counts": {"samples read": number}}


@dataclass(frozen=True)
class EndsItself:
    """Work whose process ends without a word at one item, the first `times` times."""

    log: Path
    at: int
    times: int

    def __call__(self, number: int) -> work.Result:
        n_begun = sum(words == [str(number)] for words in told(self.log))
        tell(self.log, number)
        if number == self.at and n_begun < self.times:
            os._exit(9)
        return {"counts": {"samples read": 1}}


def fail_at_three(number: int) -> work.Result:
    """Work with an error of its own."""
    if number == 3:
        raise ValueError("three is broken")
    return {"counts": {"samples read": 1}}


class CannotBeRead(OSError):
    """As the errors of some HTTP clients are: pickled, and refused where it is unpickled."""

    def __init__(self, address: str, status: int) -> None:
        super().__init__(f"{address} answers {status}")


def fail_unreadably(number: int) -> work.Result:
    """Work with an error that no other process can read."""
    raise CannotBeRead("http://here", 500 + number)


@dataclass(frozen=True)
class Where:
    """Work that tells which process works, what it sees of GPUs, and where it is; each waits until
    so many have begun.
    """

    log: Path
    n_processes: int

    def __call__(self, number: int) -> work.Result:
        tell(self.log, os.getpid())
        deadline = time.monotonic() + PATIENCE_S
        while len({pid for (pid,) in told(self.log)}) < self.n_processes:
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        about = {"pid": os.getpid(), "gpus": gpus, "folder": os.getcwd()}
        return {"counts": {}, **about, "limit": os.environ.get("VLP_DECODE_LIMIT", "")}


def read_when_let(pictures: list[Any]) -> list[str]:
    """A reader of text that waits for leave in the folder of the call."""
    WaitsForLeave(Path("log"), Path("leave"))(len(pictures))
    return ["text"] * len(pictures)


def read_slowly(pictures: list[Any]) -> list[str]:
    """A reader of text that takes a quarter of a second for what it is given at once."""
    time.sleep(0.25)
    return ["text"] * len(pictures)
