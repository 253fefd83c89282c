"""Pictures that lie where those of another set lie: DataComp's image-based filter
(arXiv 2304.14108), on stored embeddings.

The pictures of all shards are clustered by k-means (FAISS; on up to FITTED rows a cell, drawn by
--seed), each picture of the other set chooses the cell of its nearest centre, and a sample stays
where its own cell is chosen. Nearest is by the cosine.

    DIR/_cells.npz     centres [cells, D] float32, chosen [cells]: read by every shard
    DIR/_cells.json    the mark of the decision. It is one job, because threads and processors
                       change what k-means gives: no two machines may decide each for itself
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data.tensor_file import header
from vlp.data_tools._run.arrays import load, save
from vlp.data_tools.filter.heads import is_known

if TYPE_CHECKING:
    import argparse

    from vlp.data.embedded import Embeddings, Teacher
    from vlp.data_tools._run.work import Pool, Result
    from vlp.data_tools.filter.scores import Stored

FITTED = 256  # rows a cell, at most; FAISS's own bound
_ROUNDS = 20
_BLOCK = 4096  # rows that are compared with the centres at once


@dataclass(frozen=True)
class Alike:
    """Cells of the source's pictures, and which of them the other set's pictures choose."""

    embeddings: Embeddings  # the source's
    n_shards: int
    other: Path  # folder of the other set's embeddings
    n_cells: int
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace, stored: Stored | None, n_shards: int) -> Alike | None:
        """What the options name; raises ValueError."""
        other, n_cells = args.like, args.cells
        if other is None and n_cells is None:
            if args.seed:
                raise ValueError("--seed is of the cells of --like DIR, which is not given")
            return None
        if other is None or n_cells is None or stored is None:
            raise ValueError(
                "--like DIR, --cells K and --embeddings DIR go together: the other set's "
                "embeddings, the number of cells, the source's embeddings"
            )
        from vlp.data.stored import source
        from vlp.eval.search.nearest import import_faiss

        import_faiss()
        alike = cls(stored.embeddings, n_shards, source(other), n_cells, args.seed)
        n = sum(len(alike.rows(number)) for number in range(n_shards))
        if not 1 <= n_cells <= n:
            raise ValueError(f"--cells {n_cells} must lie between 1 and the {n:,} pictures")
        for path in alike.files():
            _check(path, stored.embeddings.teacher)
        return alike

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard's pictures, [n, D] float16, mapped from their file."""
        return self.embeddings.mapped(shard, "image")

    def files(self) -> list[Path]:
        """The files of the other set's embeddings; raises ValueError where there are none."""
        files = sorted(self.other.glob("*.safetensors"))
        if not files:
            raise ValueError(
                f"--like {self.other} holds no embeddings; make them with `vlp data embed`"
            )
        return files

    def settings(self) -> dict[str, Any]:
        """What the output depends on; files by name, size, and whose embeddings they are."""
        files = []
        for path in self.files():
            about = header(path).metadata
            whose = [about.get("weights", ""), about.get("keys", "")]
            files.append([path.name, path.stat().st_size, *whose])
        return {"like": files, "cells": self.n_cells, "cells_seed": self.seed}

    def decide(self, folder: Path, pool: Pool) -> Chosen | None:
        """The cells, fitted and chosen if no call before has; None while another part of the work
        does. Raises ValueError.
        """
        from vlp.data_tools._run.work import Job, all_done, carry_out

        job = Job(folder / "_cells.json", folder / "_cells.npz", 1)
        results = carry_out("cells", [job], self, pool)
        return Chosen(self.embeddings, job.item) if all_done(results) else None

    def __call__(self, path: Path) -> Result:
        """Fit the cells and choose among them."""
        centres = self._fit()
        chosen = np.zeros(len(centres), bool)
        for rows in self._other_rows():
            chosen[nearest(rows, centres)] = True
        if not chosen.any():
            raise ValueError(f"--like {self.other} holds no picture that opened")
        save(path, centres=centres, chosen=chosen)
        return {"counts": {"cells": len(chosen), "cells that are chosen": int(chosen.sum())}}

    def _fit(self) -> np.ndarray:
        """Unit centres [cells, D] float32 of the source's pictures; raises ValueError."""
        from vlp.data.permutation import permute
        from vlp.eval.search.nearest import import_faiss
        from vlp.seeds import derive

        shards = [self.rows(number) for number in range(self.n_shards)]
        ends = np.cumsum([len(rows) for rows in shards])
        n = int(ends[-1])

        # In the order of the shards, because the rows are read from their files.
        key = derive(self.seed, "cells")
        drawn = np.sort(permute(n, key, np.arange(min(n, FITTED * self.n_cells))))
        parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
        firsts = [0, *ends[:-1].tolist()]
        pieces = [rows[part - first] for rows, part, first in zip(shards, parts, firsts)]
        fitted = np.concatenate(pieces).astype(np.float32)
        fitted = fitted[is_known(fitted)]
        if len(fitted) < self.n_cells:
            raise ValueError(f"--cells {self.n_cells}: only {len(fitted):,} pictures open")

        kmeans = import_faiss().Kmeans(
            fitted.shape[1],
            self.n_cells,
            niter=_ROUNDS,
            seed=self.seed,
            spherical=True,
            min_points_per_centroid=1,  # else it warns
            max_points_per_centroid=FITTED,
        )
        kmeans.train(fitted)
        return kmeans.centroids

    def _other_rows(self) -> Iterator[np.ndarray]:
        """The other set's rows, [n, D] a file, those that opened."""
        from safetensors import safe_open

        for path in self.files():
            # Alone: captions and crops may take many times as much.
            with safe_open(path, "numpy") as file:
                rows = file.get_tensor("image")
            yield rows[is_known(rows)]


@dataclass(frozen=True)
class Chosen:
    """Which samples lie in a chosen cell, as each process asks it."""

    embeddings: Embeddings
    path: Path

    def inside(self, shard: int) -> np.ndarray:
        """Of each of a shard's pictures, bool [n]; none that did not open."""
        centres, chosen = _cells(self.path)
        rows = self.embeddings.mapped(shard, "image")
        inside = is_known(rows)
        inside[inside] = chosen[nearest(rows[inside], centres)]
        return inside


def nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The number of each row's nearest centre, [n]; of several the first."""
    numbers = np.zeros(len(rows), np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = np.asarray(rows[start : start + _BLOCK], np.float32)
        numbers[start : start + _BLOCK] = (block @ centres.T).argmax(axis=1)
    return numbers


@cache
def _cells(path: Path) -> tuple[np.ndarray, np.ndarray]:
    arrays = load(path)
    return arrays["centres"], arrays["chosen"]


def _check(path: Path, teacher: Teacher) -> None:
    """Raise ValueError for a file of another model's rows, whose cosines would mean nothing."""
    try:
        about, shapes, _ = header(path)
        _, width = shapes["image"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no embeddings of pictures ({error}); make it with `vlp data embed`"
        ) from None

    model, weights = about.get("model", ""), about.get("weights", "")
    # Older files do not tell their weights.
    has_other_weights = bool(weights and teacher.weights) and weights != teacher.weights
    if model != teacher.model or width != teacher.width or has_other_weights:
        raise ValueError(
            f"{path} is of {model or 'no model'}, width {width}, weights {weights or '?'}; the "
            f"source's embeddings are of {teacher.model}, width {teacher.width}, weights "
            f"{teacher.weights or '?'}: embed both with one model"
        )
