"""Work over a list of shards: jobs and their marks, going on after a kill, counts.

A tool makes one `Job` a shard. What the work returned for it is written as JSON to the job's mark,
last; a job that has a mark is never done again, whoever did it. So a killed call goes on where it
stopped, and machines with one file system share the work: each takes every N-th job, by `--part
K/N` or by the rank that its launcher gives it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

from vlp.data import stored
from vlp.data_tools._run.local import WorkerLost
from vlp.data_tools._run.pool import (
    RANKS,
    Pool,
    alone,
    arguments,
    check_processes,
    on_cluster,
    pool,
    ray_argument,
    shards_arguments,
    source_argument,
    undivided,
    undivided_arguments,
)
from vlp.data_tools._run.progress import Progress, say
from vlp.files import write_atomically
from vlp.lifetime import Ended

__all__ = [
    "RANKS",
    "Job",
    "Pool",
    "Result",
    "Work",
    "WorkerLost",
    "all_done",
    "alone",
    "arguments",
    "carry_out",
    "check_processes",
    "on_cluster",
    "pool",
    "printable",
    "ray_argument",
    "read_note",
    "report",
    "shards_arguments",
    "source_argument",
    "total",
    "undivided",
    "undivided_arguments",
]

_MARK_ADVICE = (
    "delete it, and a call does its shard again; of a file without a number, name another folder"
)

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
    about: str = ""  # which input it is of, in words


def carry_out(
    title: str, jobs: list[Job], work: Work, pool: Pool, unit: str = "shards"
) -> list[Result | None]:
    """Do this machine's jobs that have no mark; returns the results of all jobs in order, None
    where other parts lag. `unit`: what a job is, for messages.

    `work(item)` runs where `pool` says, in new processes, to each of which it is sent once. Its
    exception ends the call and leaves the marks of finished jobs.
    """
    share = pool.share(jobs)
    unfinished = [job for job in share if not job.mark.exists()]
    if pool.parts > 1:
        say(f"{title}: part {pool.part} of {pool.parts} is {len(share)} of {len(jobs)} {unit}")
    if len(unfinished) < len(share):
        n_finished = len(share) - len(unfinished)
        say(f"{title}: {n_finished} of {len(share)} {unit} are finished already")

    progress = Progress(title, [job.size for job in unfinished], unit)
    try:
        # Closed at once where an exception leaves the loop: nothing is begun after it.
        with closing(pool.finished(partial(_do, work), unfinished)) as finished:
            for job, n_samples in finished:
                progress.add(job.size, n_samples)
    except Ended as ended:
        n_finished = sum(job.mark.exists() for job in share)
        ended.outcome = (
            f"{title}: {n_finished} of {len(share)} {unit} are finished and stay; the same "
            "command goes on with the others"
        )
        raise
    except WorkerLost as lost:
        if isinstance(lost.item, Job):
            about = lost.item.about or f"the work of {lost.item.mark.name}"
            raise WorkerLost(f"{lost}. It was at {about}") from lost
        raise

    # The marks are read again: other machines may have finished theirs meanwhile.
    stored.bring(job.mark for job in jobs)
    results = [_result(job) for job in jobs]
    n_missing = results.count(None)
    if n_missing:
        say(
            f"{title}: {n_missing} of {len(jobs)} {unit}, all of other parts, are unfinished; "
            "once they are done, call again"
        )
    return results


def _do(work: Work, job: Job) -> int:
    """Do a job and write its mark; returns how many samples it read."""
    result = work(job.item)

    # Sets of texts, by which some are counted, come in another order in each process.
    result["counts"] = dict(sorted(result["counts"].items()))

    # Last, and at once: a mark says that all the rest of the job is on disk.
    content = json.dumps(result, indent=1, ensure_ascii=False)
    write_atomically(job.mark, content.encode())
    n_samples: int = result["counts"].get("samples read", 0)
    return n_samples


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
