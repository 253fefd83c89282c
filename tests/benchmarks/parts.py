"""Benchmarks of several runs, on one thread each: the outcome of every run is kept as JSON, so that
a later call goes on where this one stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.benchmarks import report
from vlp.files import write_atomically

Settings = dict[str, Any]  # what a part depends on besides the code, as JSON has it
Outcome = dict[str, Any]
# Of a part's settings and its new, empty folder.
Work = Callable[[Settings, Path], Outcome]


def add_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """The options that every benchmark in parts has."""
    add = parser.add_argument
    add("--out", default=out, help="folder of data and runs (default: %(default)s)")
    add("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    add("--table", action="store_true", help="run nothing, show what has finished")
    report.add_arguments(parser)


def carry_out(work: Work, parts: dict[str, Settings], out: Path, jobs: int) -> None:
    """Do the parts that have not finished. RuntimeError that names those that failed, after the
    others have ended.
    """
    missing = [name for name in parts if finished(out, name, parts[name]) is None]
    if not missing:
        return

    # Read by the processes when torch is first imported there.
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    failures = []
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_end_with_parent) as pool:
        started = {pool.submit(_carry_out, work, name, parts[name], out): name for name in missing}
        for future in as_completed(started):
            error = future.exception()
            if error is not None:
                failures.append(f"{started[future]}: {type(error).__name__}: {error}")
            else:
                print(f"{started[future]}: {future.result():.0f} CPU s", flush=True)
    if failures:
        raise RuntimeError("\n".join(failures))


def _end_with_parent() -> None:
    """Let this process end where the one that started it is killed; it would go on with the next
    part, beside a later call's.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _carry_out(work: Work, name: str, settings: Settings, out: Path) -> float:
    """One part, in place of what an interrupted call left of it; its CPU seconds."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    # Of the code that runs: files may change meanwhile.
    commit, began = report.commit(), time.process_time()
    with (out / f"{name}.log").open("w") as told, redirect_stdout(told), redirect_stderr(told):
        outcome = work(settings, folder)
    cpu_s = time.process_time() - began
    record = {"settings": settings, "commit": commit, "cpu_s": cpu_s} | outcome
    write_atomically(_record(out, name), json.dumps(record, indent=1).encode())
    return cpu_s


def finished(out: Path, name: str, settings: Settings) -> Outcome | None:
    """The record of a finished part; None where there is none. ValueError for one of other
    settings, which is not taken for this one.
    """
    path = _record(out, name)
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    # As JSON has them: a tuple comes back as a list.
    expected = json.loads(json.dumps(settings))
    if record["settings"] != expected:
        raise ValueError(
            f"{path} is of other settings ({record['settings']}, expected {expected}); remove it "
            "or choose another --out"
        )
    return record


def all_finished(out: Path, parts: dict[str, Settings]) -> dict[str, Outcome]:
    """The records of the parts that have finished, in the order of `parts`."""
    records = {name: finished(out, name, settings) for name, settings in parts.items()}
    return {name: record for name, record in records.items() if record is not None}


def commits(records: list[Outcome]) -> str:
    """At which commits the parts were run, for a table's notes."""
    return ", ".join(sorted({record["commit"] for record in records}))


def _record(out: Path, name: str) -> Path:
    return out / f"{name}.json"
