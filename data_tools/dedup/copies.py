"""The decision about all samples: exactly in memory, or by a search in stages; kept in the output's
folder, with a page for people.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlp.data.stored import remove_folder
from vlp.data_tools._run.work import Pool, read_note
from vlp.data_tools.dedup import arrays, decision, plan
from vlp.data_tools.dedup.decision import DROPPED
from vlp.data_tools.dedup.drop import Decision
from vlp.data_tools.dedup.embedded import Rows
from vlp.data_tools.dedup.near import Limits, decide
from vlp.data_tools.dedup.stages import Search
from vlp.data_tools.dedup.survey import prints_file
from vlp.files import replacing, write_atomically

# Samples that are compared all with all where nothing else is asked for: it takes seconds there.
EXACT_UP_TO = 200_000
EXACT_ROWS_UP_TO = 50_000  # with embeddings
Method = Literal["exact", "buckets"]


@dataclass(frozen=True)
class Compared:
    """Everything that is compared, group by group: what --against holds, then the source."""

    groups: list[list[Path]]
    sizes: list[int]  # samples of each shard
    rows: Rows | None  # their embeddings
    limits: Limits

    @property
    def n_fixed(self) -> int:
        """The samples of all groups but the last, which stay whatever they are."""
        return sum(self.sizes[: -len(self.groups[-1])])

    def prints(self, folder: Path) -> list[Path]:
        return [prints_file(folder, number) for number in range(len(self.sizes))]


def decided(
    kept: Decision, compared: Compared, method: Method, division: plan.Division, pool: Pool
) -> Counter[str] | None:
    """Decide, once, and keep it; what was passed over, by reason. None where other machines have
    not finished their part of the search. Raises ValueError.
    """
    folder = kept.folder
    note = folder / "_dropped.json"
    if not kept.exists():
        dropped, counts = _before(folder, sum(compared.sizes)), Counter[str]()
        if dropped is None and method == "exact":
            dropped = _exactly(folder, compared)
        elif dropped is None:
            search_folder = folder / arrays.SEARCH_FOLDER
            n, n_fixed = sum(compared.sizes), compared.n_fixed
            planned = plan.planned(search_folder, n, n_fixed, compared.limits, division)
            search = Search(search_folder, compared.prints(folder), compared.sizes, planned, pool)
            copies = search.copies(compared.rows)
            if copies is None:
                return None
            dropped = decision.decide(copies, n_fixed, compared.limits.keep_copies)
            counts = search.counts

        # The decision itself last: a killed call that left only the page for people decides again.
        _write_page(folder / "copies.jsonl", dropped, compared)
        write_atomically(note, json.dumps({"counts": +counts}, indent=1).encode())
        kept.save(dropped)
    return _counts(note)


def _counts(note: Path) -> Counter[str]:
    # It says nothing but what was passed over: the decision is whole without it.
    counts = read_note(note).get("counts") if note.exists() else {}
    return Counter(counts if isinstance(counts, dict) else {})


def forget_search(folder: Path) -> None:
    """Remove what the stages handed to one another, once all shards are written."""
    remove_folder(folder / arrays.SEARCH_FOLDER)


def _before(folder: Path, n: int) -> np.ndarray | None:
    """DROPPED samples of a decision about n that an earlier version kept in another form, if it
    did; ValueError for one about others.
    """
    path = folder / "_copies.npy"
    if not path.exists():
        return None
    copy_of = arrays.load(path)
    if copy_of.shape != (n,) or copy_of.dtype != np.int64:
        raise ValueError(
            f"{path} is damaged, or no decision about these {n} samples (it holds {copy_of.dtype} "
            f"{copy_of.shape}); delete it, and the same call decides again"
        )
    return _dropped(copy_of, np.full(len(copy_of), np.nan))


def _exactly(folder: Path, compared: Compared) -> np.ndarray:
    """DROPPED samples by comparing all with all, in this process."""
    rows = compared.rows
    pieces = [] if rows is None else [rows.of_shard(i) for i in range(len(compared.sizes))]
    prints = np.array(arrays.joined(compared.prints(folder)))
    return _dropped(*decide(prints, pieces, compared.n_fixed, compared.limits))


def _dropped(copy_of: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    samples = np.flatnonzero(copy_of >= 0)
    dropped = np.empty(len(samples), DROPPED)
    dropped["sample"] = samples
    dropped["copy_of"], dropped["cosine"] = copy_of[samples], cosines[samples]
    return dropped


def _write_page(path: Path, dropped: np.ndarray, compared: Compared) -> None:
    """A line of JSON for each dropped sample: where it lies, what it is a copy of, what told."""
    paths = list(map(str, chain.from_iterable(compared.groups)))
    ends = np.cumsum(compared.sizes)

    def place(sample: int) -> dict[str, Any]:
        shard = int(np.searchsorted(ends, sample, "right"))
        first = int(ends[shard]) - compared.sizes[shard]
        return {"shard": paths[shard], "sample": sample - first}

    def lines() -> Iterator[str]:
        for sample, other, cosine in map(np.void.item, dropped):
            by = "hash" if np.isnan(cosine) else f"cosine {cosine:.3f}"
            record = {**place(sample), "copy_of": place(other), "by": by}
            yield json.dumps(record, ensure_ascii=False) + "\n"

    with replacing(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        file.writelines(lines())
