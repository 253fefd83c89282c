"""How the search for copies is divided: fixed before it begins, so that a call that goes on divides
as the one before it did.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlp import log
from vlp.data_tools._run.work import read_note
from vlp.data_tools.dedup.bands import Bands
from vlp.data_tools.dedup.near import Limits
from vlp.files import write_atomically

BYTES_A_ROW = 250  # of any stage, at most
_JOBS = 64  # of a stage, where memory allows as many rows in each
_OTHER_CELLS = -1  # rows a cell, of a plan of cells that are not those of now
_LEAST_ROWS = 100_000  # a job of fewer costs more to begin than to do


class Run(NamedTuple):
    """Shards that follow one another and are sorted together."""

    number: int
    shards: list[int]
    first: int  # the number of its first sample


@dataclass(frozen=True)
class Division:
    """What may be chosen: the memory of a process in bytes; how many embeddings a cell has (0:
    there are none), and how many cells a sample looks into.
    """

    memory: int
    rows_a_cell: int
    probes: int


@dataclass(frozen=True)
class Plan:
    """The search among n samples, the first `n_fixed` of which are those of --against."""

    n: int
    n_fixed: int
    distance: int
    cosine: float
    keep_copies: bool
    n_blocks: int
    memory: int  # bytes of a process
    rows_a_cell: int  # 0: no embeddings
    probes: int

    @property
    def rows_at_once(self) -> int:
        """The rows that memory allows in any stage."""
        return max(1, self.memory // BYTES_A_ROW)

    @property
    def rows_a_job(self) -> int:
        """Rows of a job: few enough for many processes to share, and no more than memory allows."""
        return min(self.rows_at_once, max(_LEAST_ROWS, self.n // _JOBS))

    @property
    def bands(self) -> Bands:
        return Bands(self.distance, self.n_blocks)

    @property
    def blocks(self) -> range:
        """The blocks by whose values hashes are divided; none where only equal ones are copies."""
        return self.bands.firsts if self.distance > 0 else range(0)

    def matters(self, earlier: np.ndarray) -> np.ndarray:
        """Whether pairs, by the number of their earlier sample, can decide anything."""
        if self.keep_copies:
            return earlier < self.n_fixed
        return np.ones(earlier.shape, bool)


def planned(folder: Path, n: int, n_fixed: int, limits: Limits, division: Division) -> Plan:
    """The plan of `folder`, made where it has none; raises ValueError for one that is damaged, or
    of other samples.
    """
    path = folder / "plan.json"
    if not path.exists():
        # At 0 bits only equal hashes are copies, and those meet when they are sorted.
        n_blocks = Bands.cheapest(limits.distance, n).n_blocks if limits.distance > 0 else 0
        plan = Plan(n, n_fixed, **asdict(limits), n_blocks=n_blocks, **asdict(division))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(plan), indent=1).encode())
    try:
        kept = Plan(**_with_cells(read_note(path)))
    # The folder, because what lies beside it was divided as the plan said.
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder {folder}") from None

    if kept.rows_a_cell == _OTHER_CELLS:
        raise ValueError(
            f"{folder} was begun by an earlier version, which divided embeddings into cells "
            "otherwise: delete the folder, and the same call searches anew"
        )
    # What its stages found names samples by their numbers.
    if (kept.n, kept.n_fixed) != (n, n_fixed):
        raise ValueError(
            f"{folder} was begun among {kept.n} samples, {kept.n_fixed} of --against; now there "
            f"are {n} and {n_fixed}: delete the folder, and the same call searches anew"
        )
    if kept.memory != division.memory:
        log.warn(
            f"the search was divided for --memory {kept.memory / 1e9:g} and goes on so; to divide "
            f"it for {division.memory / 1e9:g}, delete the folder {folder}"
        )
    return kept


def _with_cells(note: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan, also of one that tells the number of cells, as they did before."""
    n_cells = note.pop("n_cells", None)
    if n_cells is not None:
        note["rows_a_cell"] = _OTHER_CELLS if n_cells else 0
    return note


def runs(sizes: list[int], most_rows: int) -> Iterator[Run]:
    """All shards, by their numbers of samples, in runs of at most so many rows, or of one shard."""
    number = first = n_rows = 0
    shards: list[int] = []
    for shard, size in enumerate(sizes):
        if shards and n_rows + size > most_rows:
            yield Run(number, shards, first)
            number, first = number + 1, first + n_rows
            shards, n_rows = [], 0
        shards.append(shard)
        n_rows += size
    yield Run(number, shards, first)
