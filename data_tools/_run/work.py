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

from vlp.data import stored
from vlp.data.stored import StoredPath
from vlp.files import remove_leftovers, write_atomically
from vlp.lifetime import Ended, end_with_parent
from vlp.locks import held

# Of torchrun and accelerate launch; of srun.
RANKS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
_MARK_ADVICE = (
    "delete it, and a call does its shard again; of a file without a number, name another folder"
)
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
class Pool:
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
        help="only every N-th shard from the K-th on, for N machines that share the output's "
        "folder (default: the rank in RANK and WORLD_SIZE or SLURM_PROCID and SLURM_NTASKS, "
        "else 1/1)",
    )


def pool(args: argparse.Namespace) -> Pool:
    """The pool that the options and the launcher's environment name; raises ValueError."""
    n_processes: int = args.processes
    if n_processes < 1:
        raise ValueError(f"--processes {n_processes} must be at least 1")

    # What the user says goes before what the launcher says.
    if args.part:
        part, _, parts = args.part.partition("/")
        return Pool(n_processes, *_part(args.part, part, parts))

    for rank_name, world_name in RANKS:
        if rank_name in os.environ and world_name in os.environ:
            rank, world = os.environ[rank_name], os.environ[world_name]
            part = str(int(rank) + 1) if rank.isdecimal() else rank
            setting = f"{rank_name}={rank} {world_name}={world}"
            return Pool(n_processes, *_part(setting, part, world))
    return Pool(n_processes)


def _part(setting: str, part: str, parts: str) -> tuple[int, int]:
    are_numbers = part.isdecimal() and parts.isdecimal()
    if not (are_numbers and 1 <= int(part) <= int(parts)):
        raise ValueError(
            f"{setting!r} names no part of the shards; "
            "expected --part K/N with 1 <= K <= N, or a rank of a larger world"
        )
    return int(part), int(parts)


def alone(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Decorate a tool's `run`: nobody else works in the folder --to meanwhile, but for the other
    parts of the work.
    """

    @wraps(run)
    def guarded(args: argparse.Namespace) -> int:
        if not args.to:
            return run(args)

        folder = stored.destination(args.to)
        advice = "Wait until it is done, or name another folder with --to"
        share = Pool()
        if hasattr(args, "part"):
            share = pool(args)
            advice += "; to share the work, give each call its --part K/N"

        part = (share.part, share.parts)
        if isinstance(folder, StoredPath):
            from vlp.data_tools._run.writers import writing

            with writing(folder, advice=advice, part=part):
                return run(args)

        with held(folder, advice=advice, part=part):
            # Files that a killed call left half-written are nobody's, unless another part writes.
            if share.parts == 1:
                remove_leftovers(folder)
            return run(args)

    return guarded


def carry_out(title: str, jobs: list[Job], work: Work, pool: Pool) -> list[Result | None]:
    """Do this machine's jobs that have no mark; returns the results of all jobs in order, None
    where other parts lag.

    `work(item)` runs in `pool.processes` new processes, to which it is sent once. Its exception
    ends the call and leaves the marks of finished jobs.
    """
    share = pool.share(jobs)
    unfinished = [job for job in share if not job.mark.exists()]
    if pool.parts > 1:
        _say(f"{title}: part {pool.part} of {pool.parts} is {len(share)} of {len(jobs)} shards")
    if len(unfinished) < len(share):
        n_finished = len(share) - len(unfinished)
        _say(f"{title}: {n_finished} of {len(share)} shards are finished already")

    progress = _Progress(title, unfinished)
    try:
        for job, result in _finished(work, unfinished, pool.processes):
            progress.add(job, result)
    except Ended as ended:
        n_finished = sum(job.mark.exists() for job in share)
        ended.outcome = (
            f"{title}: {n_finished} of {len(share)} shards are finished and stay; the same command "
            "goes on with the others"
        )
        raise

    # The marks are read again: other machines may have finished theirs meanwhile.
    stored.bring(job.mark for job in jobs)
    results = [_result(job) for job in jobs]
    n_missing = results.count(None)
    if n_missing:
        _say(
            f"{title}: {n_missing} of {len(jobs)} shards, all of other parts, are unfinished; "
            "once they are done, call again"
        )
    return results


def _result(job: Job) -> Result | None:
    """What a job's mark says; None where it has none yet."""
    if not job.mark.exists():
        return None
    result: Result = read_note(job.mark)
    if not isinstance(result.get("counts"), dict):
        raise ValueError(f"{job.mark} holds no counts; {_MARK_ADVICE}")
    return result


def read_note(path: Path) -> dict[str, Any]:
    """The object in a file of JSON that a tool wrote into its output; ValueError for damage."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {_MARK_ADVICE}") from None
    if not isinstance(note, dict):
        raise ValueError(f"{path} is damaged (it holds no object); {_MARK_ADVICE}")
    return note


def all_done(results: list[Result | None]) -> TypeGuard[list[Result]]:
    """Whether every job has its result, and none waits for another machine."""
    return None not in results


def total(results: Iterable[Result | None]) -> Counter[str]:
    """The counts of all finished jobs together."""
    return sum((Counter(result["counts"]) for result in results if result is not None), Counter())


def report(counts: Counter[str], title: str) -> str:
    """Counts as aligned lines, in the order of their names."""
    width = max(map(len, counts), default=0)
    lines = [f"  {name:{width}}  {counts[name]:>9,}" for name in sorted(counts)]
    return "\n".join([title, *lines])


def printable(text: str) -> str:
    """The text as a terminal or a file in UTF-8 takes it: lone surrogates become question marks."""
    return text.encode(errors="replace").decode()


def _finished(work: Work, jobs: list[Job], processes: int) -> Iterator[tuple[Job, Result]]:
    """Each job with its result as soon as it is there."""
    n = min(processes, len(jobs))
    if n <= 1:
        for job in jobs:
            yield job, _do(work, job)
        return

    # Processes are started afresh: a fork may hang once torch ran.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n, context, _begin, (work, n)) as executor:
        waiting = {executor.submit(_do_in_worker, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise WorkerLost(
                "a process ended without a word, most often for want of memory; "
                "call again, with fewer --processes: the shards that are finished stay"
            ) from error
        finally:
            # After an exception what was begun ends, and nothing else begins.
            executor.shutdown(wait=True, cancel_futures=True)


_work: Work | None = None  # of a pool's process


def _begin(work: Work, n_processes: int) -> None:
    """Prepare a process: it knows the work, shares the cores, and ends when its parent does, even
    by SIGKILL.
    """
    global _work
    _work = work

    # Read when torch is imported; without it every process would use all cores.
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
    end_with_parent()


def _do_in_worker(job: Job) -> Result:
    assert _work is not None  # the pool's initializer has set it
    return _do(_work, job)


def _do(work: Work, job: Job) -> Result:
    result = work(job.item)

    # Last, and at once: a mark says that all the rest of the job is on disk.
    content = json.dumps(result, indent=1, ensure_ascii=False)
    write_atomically(job.mark, content.encode())
    return result


class _Progress:
    """Shards, samples, throughput and time left on stderr: one line on a terminal, else a line now
    and then.
    """

    def __init__(self, title: str, jobs: list[Job]) -> None:
        self.title = title
        self.n_jobs = len(jobs)
        self.size = sum(job.size for job in jobs)
        self.n_done = self.n_samples = self.size_done = 0
        self.start = time.monotonic()
        self.last_shown = self.start - QUIET_S

    def add(self, job: Job, result: Result) -> None:
        """One more is done."""
        self.n_done += 1
        self.n_samples += result["counts"].get("samples read", 0)
        self.size_done += job.size

        now = time.monotonic()
        is_last = self.n_done == self.n_jobs
        on_terminal = sys.stderr.isatty()
        if not (on_terminal or is_last or now - self.last_shown >= QUIET_S):
            return
        self.last_shown = now
        line = self._line(max(now - self.start, 1e-9), is_last)

        # A terminal's line is overwritten by the next; a log file gets whole lines.
        if on_terminal:
            _say(f"\r{line:<100}", end="\n" if is_last else "")
        else:
            _say(line)

    def _line(self, elapsed_s: float, is_last: bool) -> str:
        rate = self.n_samples / elapsed_s
        line = f"{self.title}: {self.n_done}/{self.n_jobs} shards"
        line += f", {self.n_samples:,} samples, {rate:,.0f}/s"
        if is_last:
            return f"{line}, took {clock(round(elapsed_s))}"

        # Shards differ in size, so the time left goes by bytes.
        left_s = round(elapsed_s * (self.size - self.size_done) / max(self.size_done, 1))
        return f"{line}, {clock(left_s)} left"


def clock(seconds: int) -> str:
    """Seconds as people read them: 1:02:03, 2:03."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
