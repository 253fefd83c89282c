"""The search for copies among many samples: stages of jobs with marks, each of bounded memory.

A killed call goes on with the job that has no mark. What is found depends on nothing but the plan,
however many processes or machines search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlp.data_tools._run import work
from vlp.data_tools._run.work import Job, Pool, Result, Work
from vlp.data_tools.dedup import arrays, cells, hashed
from vlp.data_tools.dedup.decision import SIMILAR, Copies
from vlp.data_tools.dedup.embedded import Rows
from vlp.data_tools.dedup.hashed import file
from vlp.data_tools.dedup.plan import Plan, Run, runs

_NO_HASHES = (np.empty((0, 2), np.int64), np.empty(0, hashed.PAIR))
_NO_ROWS = (np.empty((0, 2), np.int64), np.empty(0, SIMILAR))


class Search:
    """All stages over the fingerprints and the embeddings of all samples."""

    def __init__(
        self, folder: Path, prints: list[Path], sizes: list[int], plan: Plan, pool: Pool
    ) -> None:
        """`prints`: the fingerprints of each shard, of so many samples."""
        self.folder = folder
        self.prints = prints
        self.plan = plan
        self.pool = pool
        self.runs = list(runs(sizes, plan.rows_a_job))
        self.counts: Counter[str] = Counter()

    def copies(self, rows: Rows | None) -> Copies | None:
        """All pairs; None where other machines have not finished their part of a stage."""
        by_hash = self._near() if self.plan.distance >= 0 else _NO_HASHES
        if by_hash is None:
            return None
        by_cosine = self._similar(rows) if rows is not None else _NO_ROWS
        if by_cosine is None:
            return None
        return Copies(*by_hash, *by_cosine)

    def _near(self) -> tuple[np.ndarray, np.ndarray] | None:
        """(members, near) of `Copies`."""
        folder, plan, n_runs = self.folder, self.plan, len(self.runs)
        sorted_runs = self._carry_out("sort", hashed.Sort(folder, self.prints), self._run_jobs())
        if sorted_runs is None:
            return None

        n_prints = sum(result["prints"] for result in sorted_runs)
        edges = hashed.hash_ranges(folder, n_runs, n_prints, plan.rows_a_job)
        n_ranges = len(edges) - 1
        ranges = [((i, low, high), 1) for i, (low, high) in enumerate(pairwise(edges))]
        if self._carry_out("group", hashed.Group(folder, plan, n_runs), ranges) is None:
            return None

        parts = self._band_parts(n_ranges)
        if self._carry_out("compare", hashed.Compare(folder, plan, n_ranges), parts) is None:
            return None
        members = [(i, "run_members") for i in range(n_runs)]
        members += [(i, "members") for i in range(n_ranges)]
        near = [(i, "alike") for i in range(n_ranges)] + [(i, "near") for i in range(len(parts))]
        return self._joined(members), self._joined(near)

    def _band_parts(self, n_ranges: int) -> list[tuple[Any, int]]:
        """The jobs over all blocks: ranges of values, and how many rows each has."""
        parts: list[tuple[Any, int]] = []
        for block in self.plan.blocks:
            bands = [file(self.folder, i, f"band{block}") for i in range(n_ranges)]
            even_parts = arrays.even_parts(arrays.sizes(bands), self.plan.rows_a_job)
            for low, high, n_rows in even_parts:
                parts.append(((len(parts), block, low, high), n_rows))
        return parts

    def _similar(self, rows: Rows) -> tuple[np.ndarray, np.ndarray] | None:
        """(equal, similar) of `Copies`."""
        folder, plan, n_runs = self.folder, self.plan, len(self.runs)
        if self._carry_out("centres", cells.FitCentres(folder, plan, rows), [(None, 1)]) is None:
            return None
        assign = cells.Assign(folder, plan, rows)
        if self._carry_out("assign", assign, self._run_jobs()) is None:
            return None

        sizes = arrays.sizes(file(folder, i, "cells") for i in range(n_runs))
        parts = [
            ((i, low, high), n_rows)
            for i, (low, high, n_rows) in enumerate(arrays.even_parts(sizes, plan.rows_a_job))
        ]
        search = cells.SearchCells(folder, plan, rows, n_runs)
        if self._carry_out("cells", search, parts) is None:
            return None
        equal = self._joined((i, "equal") for i in range(len(parts)))
        return equal, self._joined((i, "similar") for i in range(len(parts)))

    def _run_jobs(self) -> list[tuple[Run, int]]:
        return [(run, len(run.shards)) for run in self.runs]

    def _carry_out(self, stage: str, do: Work, items: list[tuple[Any, int]]) -> list[Result] | None:
        """The results of a stage's jobs, each an item and its size; None where some are missing."""
        jobs = [
            Job(self.folder / f"{i:05d}_{stage}.json", item, size)
            for i, (item, size) in enumerate(items)
        ]
        results = work.carry_out(f"search: {stage}", jobs, do, self.pool)
        if not work.all_done(results):
            return None
        counts = work.total(results)
        del counts["samples read"]
        self.counts += counts
        return results

    def _joined(self, files: Iterable[tuple[int, str]]) -> np.ndarray:
        return arrays.joined(file(self.folder, number, kind) for number, kind in files)
