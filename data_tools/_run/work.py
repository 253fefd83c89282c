"""Work over a list of shards: local processes, progress, going on after a kill, many machines.

A tool makes one `Job` a shard. What the work returned for it is written as JSON to the job's mark,
last; a job that has a mark is never done again, whoever did it. So a killed call goes on where it
stopped, and machines with one file system share the work: each takes every N-th job, by `--part
K/N` or by the rank that its launcher gives it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeGuard

from vlp.files import remove_leftovers, write_atomically
from vlp.lifetime import end_with_parent
from vlp.locks import held

RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
)  # torchrun and accelerate launch; srun
QUIET_S = 10  # between two lines of progress where they do not overwrite one another

Result = dict[str, Any]  # JSON; "counts" says what happened to how many samples
Work = Callable[[Any], Result]


@dataclass(frozen=True)
class Job:
    """One shard's work. `item` must be picklable; `size` (bytes, say) is its share of the whole in
    the time left.
    """

    mark: Path
    item: Any
    size: int


@dataclass(frozen=True)
class Crew:
    """Who does the work: the processes of this machine, and the part of the jobs that this machine
    takes.
    """

    processes: int = 1
    part: int = 1
    parts: int = 1

    def share(self, jobs: list[Job]) -> list[Job]:
        """This machine's jobs: every `parts`-th."""
        return jobs[self.part - 1 :: self.parts]


class WorkerLost(RuntimeError):
    """A process of the pool ended without an exception of its own."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that goes over shards."""
    add = parser.add_argument
    add(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="shards at the same time (default: %(default)s)",
    )
    add(
        "--part",
        metavar="K/N",
        help="only every N-th shard from the K-th on, for N machines that share the output's folder "
        "(default: the rank in RANK and WORLD_SIZE or SLURM_PROCID and SLURM_NTASKS, else 1/1)",
    )


def crew(args: argparse.Namespace) -> Crew:
    """The crew that the options and the launcher's environment name; raises ValueError."""
    if args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    if args.part:
        return Crew(args.processes, *_part(args.part, *args.part.partition("/")[::2]))
    for rank, world in RANKS:
        if rank in os.environ and world in os.environ:
            k, n = os.environ[rank], os.environ[world]
            return Crew(
                args.processes,
                *_part(f"{rank}={k} {world}={n}", str(int(k) + 1) if k.isdecimal() else k, n),
            )
    return Crew(args.processes)


def _part(said: str, k: str, n: str) -> tuple[int, int]:
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(
            f"{said!r} names no part of the shards; expected --part K/N with 1 <= K <= N, or a rank of a larger world"
        )
    return int(k), int(n)


def alone(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a tool's `run`: nobody else works in the folder --to meanwhile, but for the other
    parts of the work.
    """

    @wraps(run)
    def guarded(args: argparse.Namespace) -> int:
        if not args.to:
            return run(args)
        folder, share = Path(args.to), crew(args) if hasattr(args, "part") else Crew()
        advice = "Wait until it is done, or name another folder with --to"
        if hasattr(args, "part"):
            advice += "; to share the work, give each call its --part K/N"
        with held(folder, advice=advice, part=(share.part, share.parts)):
            if share.parts == 1:
                remove_leftovers(folder)
            return run(args)

    return guarded


def carry_out(title: str, jobs: list[Job], work: Work, crew: Crew) -> list[Result | None]:
    """Do this machine's jobs that have no mark; returns the results of all jobs in order, None
    where other parts lag.

    `work(item)` runs in `crew.processes` new processes, to which it is sent once. Its exception
    ends the call and leaves the marks of finished jobs.
    """
    mine = crew.share(jobs)
    todo = [job for job in mine if not job.mark.exists()]
    if crew.parts > 1:
        _say(f"{title}: part {crew.part} of {crew.parts} is {len(mine)} of {len(jobs)} shards")
    if len(todo) < len(mine):
        _say(f"{title}: {len(mine) - len(todo)} of {len(mine)} shards are finished already")
    progress = _Progress(title, todo)
    for job, result in _finished(work, todo, crew.processes):
        progress.add(job, result)
    results = [
        json.loads(job.mark.read_text(encoding="utf-8")) if job.mark.exists() else None
        for job in jobs
    ]
    if missing := results.count(None):
        _say(
            f"{title}: {missing} of {len(jobs)} shards, all of other parts, are unfinished; once they are done, call again"
        )
    return results


def all_done(results: list[Result | None]) -> TypeGuard[list[Result]]:
    """Whether every job has its result, and none waits for another machine."""
    return None not in results


def total(results: Iterable[Result | None]) -> Counter[str]:
    """The counts of all finished jobs together."""
    return sum((Counter(result["counts"]) for result in results if result is not None), Counter())


def report(counts: Counter[str], title: str) -> str:
    """Counts as aligned lines, in the order of their names."""
    width = max(map(len, counts), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {counts[name]:>9,}" for name in sorted(counts))])


def printable(text: str) -> str:
    """The text as a terminal or a file in UTF-8 takes it: a lone surrogate becomes a question mark."""
    return text.encode(errors="replace").decode()


def _finished(work: Work, jobs: list[Job], processes: int) -> Iterator[tuple[Job, Result]]:
    """Each job with its result as soon as it is there."""
    if min(processes, len(jobs)) <= 1:
        for job in jobs:
            yield job, _do(work, job)
        return
    n = min(processes, len(jobs))
    # Processes are started afresh: a fork may hang once torch ran.
    with ProcessPoolExecutor(n, multiprocessing.get_context("spawn"), _begin, (work, n)) as pool:
        doing = {pool.submit(_do_mine, job): job for job in jobs}
        try:
            for future in as_completed(doing):
                yield doing.pop(future), future.result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a process ended without a word, most often for want of memory; call again, with fewer --processes: "
                "the shards that are finished stay"
            ) from error
        finally:
            pool.shutdown(
                wait=True, cancel_futures=True
            )  # after an exception: what was begun ends, nothing else begins


_work: Work | None = None  # of a pool's process


def _begin(work: Work, n_processes: int) -> None:
    """Prepare a process: it knows the work, shares the cores, and ends when its parent does, even
    by SIGKILL.
    """
    global _work
    _work = work
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_processes))
    )  # read when torch is imported
    end_with_parent()


def _do_mine(job: Job) -> Result:
    assert _work is not None  # the pool's initializer has set it
    return _do(_work, job)


def _do(work: Work, job: Job) -> Result:
    result = work(job.item)
    write_atomically(job.mark, json.dumps(result, indent=1, ensure_ascii=False).encode())
    return result


class _Progress:
    """Shards, samples, throughput and time left on stderr: one line on a terminal, else a line now
    and then.
    """

    def __init__(self, title: str, jobs: list[Job]) -> None:
        self.title, self.n_jobs, self.size = title, len(jobs), sum(job.size for job in jobs)
        self.n_done = self.n_samples = self.size_done = 0
        self.start = time.monotonic()
        self.said = self.start - QUIET_S

    def add(self, job: Job, result: Result) -> None:
        """One more is done."""
        self.n_done += 1
        self.n_samples += result["counts"].get("samples read", 0)
        self.size_done += job.size
        now, last = time.monotonic(), self.n_done == self.n_jobs
        elapsed, terminal = max(now - self.start, 1e-9), sys.stderr.isatty()
        if not (terminal or last or now - self.said >= QUIET_S):
            return
        self.said = now
        left = round(elapsed * (self.size - self.size_done) / max(self.size_done, 1))
        line = f"{self.title}: {self.n_done}/{self.n_jobs} shards, {self.n_samples:,} samples, {self.n_samples / elapsed:,.0f}/s"
        line += f", took {_clock(round(elapsed))}" if last else f", {_clock(left)} left"
        _say(f"\r{line:<100}" if terminal else line, end="\n" if last or not terminal else "")


def _clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
