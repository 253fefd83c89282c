"""Batches from one cell at a time: the order of multistage contrastive learning (MCL, Zhang et al.
2024, arXiv 2402.11816).

An earlier stage's image features, clustered, give every sample a label (`vlp data cells`). A cell
is the samples that agree in all labels given. Every global batch comes from one cell, so that what
earlier stages tell apart is of no help and the next one must learn something else.

An epoch holds size // B batches of every cell, all of them in a random order: every sample stands
in it at most once, and size mod B samples of each cell, other ones each epoch, are left out.
Batches are a pure function of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlp import log
from vlp.data.mix import Mixture, Rows
from vlp.data.permutation import permute
from vlp.data.sources import Source
from vlp.files import write_atomically
from vlp.seeds import derive

# Samples whose content is compared when labels are read: tars of equal layout may hold other
# pictures.
_PROBES = 64
_HASHED = "2:"  # before a hash of fingerprints that are made of the shards' digests
_TRIED_AT_ONCE = 64  # stand-ins that are computed together, for each row of a batch


def collection(mixture: Mixture, like: str | None = None) -> str:
    """A hash that changes whenever samples are added, moved or (as far as 64 of them tell)
    exchanged. `like`: one to compare it with, which may be of the version before.
    """
    is_earlier = like is not None and not like.startswith(_HASHED)
    fingerprints = [
        source.earlier_fingerprint() if is_earlier else source.fingerprint()
        for source in mixture.sources
    ]
    total = hashlib.sha256("".join(fingerprints).encode())

    probes = np.unique(np.linspace(0, mixture.n_samples - 1, _PROBES).astype(int))
    for sample_id in probes:
        try:
            sample = mixture.read(int(sample_id))
            total.update(sample.key.encode() + b"\0" + sample.image)
        except (OSError, ValueError):
            # Damage is the loader's to tell; the labels fit as before.
            total.update(b"unreadable")
    return total.hexdigest() if is_earlier else _HASHED + total.hexdigest()


def write_labels(
    path: Path, labels: np.ndarray, n_clusters: int, mixture: Mixture, made_by: dict[str, Any]
) -> None:
    """Keep a label in [0, n_clusters) for every sample of `mixture`, int32 [n], with what they were
    made for.
    """
    about = {"n_clusters": n_clusters, "collection": collection(mixture), **made_by}
    metadata = {"vlp cells": json.dumps(about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save({"labels": labels.astype(np.int32)}, metadata=metadata))


def read_labels(path: str | Path, mixture: Mixture) -> tuple[np.ndarray, int]:
    """(labels [n], number of clusters); ValueError where the file is no such file or was made for
    other samples.
    """
    remedy = "make labels for these sources with vlp data cells"
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads(file.metadata()["vlp cells"])
            labels = file.get_tensor("labels")
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no labels of cells ({error or type(error).__name__}); {remedy}"
        ) from None

    # Labels are by position: of other samples they would be noise that nothing else notices.
    if len(labels) != mixture.n_samples:
        raise ValueError(
            f"{path} labels {len(labels)} samples, but the data has {mixture.n_samples}; {remedy}"
        )
    if about["collection"] != collection(mixture, like=about["collection"]):
        raise ValueError(f"{path} was made for other samples than those of the data; {remedy}")
    return labels, about["n_clusters"]


class Cells(Mixture):
    """A mixture whose batches of `batch` rows each come from one cell. `labels`: files, one for
    each earlier stage.

    Cells smaller than a batch are an error, or with `small="merge"` pooled: in the order of their
    labels, first stage first, until a pool fills a batch; what remains at the end joins the last
    pool, or the largest cell. Memory: about 50 bytes a sample for a moment at the start; then 4,
    shared by a rank's loader processes.
    """

    def __init__(
        self,
        sources: list[Source],
        weights: list[float | None],
        *,
        seed: int,
        shuffle: bool,
        labels: Sequence[str],
        batch: int,
        small: str = "error",
    ) -> None:
        super().__init__(sources, weights, seed=seed, shuffle=shuffle)

        if self.shares is not None:
            raise ValueError(
                "batches from cells and weights of sources exclude each other; "
                "leave the weights out"
            )
        if any(source.window for source in sources):
            raise ValueError(
                "a batch from one cell would fetch many remote shards; "
                "copy them here and use `name: shards`"
            )
        if any(source.reserve for source in sources):
            raise ValueError(
                "a batch from one cell needs samples from anywhere, a stream gives them in turn; "
                "pack it into shards"
            )

        cell = self._cells(labels, batch, small)
        self.sizes = np.bincount(cell)
        # Slots are the batches of an epoch, cell by cell.
        self._cell_of_slot = np.repeat(np.arange(len(self.sizes)), self.sizes // batch)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._digest = hashlib.sha256(cell.astype(np.int32).tobytes()).hexdigest()[:16]

        # In shared memory, as loader processes receive it; half the bytes where 32 bits are enough.
        width = np.int32 if self.n_samples < 2**31 else np.int64
        members = np.argsort(cell, kind="stable").astype(width)
        self._members = torch.from_numpy(members).share_memory_()

    def _cells(self, labels: Sequence[str], batch: int, small: str) -> np.ndarray:
        """The cell of each sample, int64 [n samples], small ones pooled or refused."""
        # Samples are of one cell where all labels agree: one number for each combination.
        combined = np.zeros(self.n_samples, np.int64)
        for path in labels:
            stage_labels, n_clusters = read_labels(path, self)
            combined = combined * n_clusters + stage_labels

        _, cell, sizes = np.unique(combined, return_inverse=True, return_counts=True)

        n_small = int((sizes < batch).sum())
        if n_small and small == "error":
            raise ValueError(
                f"{n_small} of {len(sizes)} cells are smaller than the batch of {batch} "
                f"(the smallest has {sizes.min()} samples); set train.batch lower, "
                "cluster into fewer, or set small: merge"
            )
        if n_small:
            cell = _pooled(sizes, batch)[cell]

        kept_sizes = np.bincount(cell)
        log.say(
            f"cells: {len(kept_sizes)} of {kept_sizes.min():,} to {kept_sizes.max():,} samples; "
            f"{n_small} small ones pooled"
        )
        return cell

    def steps_per_epoch(self, size: int) -> int:
        return len(self._cell_of_slot)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"cells": self._digest}

    def rows(self, step: int, size: int, rows: range) -> Rows:
        epoch, cell, turn = self._place(step)
        positions = turn * size + np.arange(rows.start, rows.stop)
        members = self._shuffled(int(self.sizes[cell]), positions, "cell", epoch, cell)
        return Rows(self._samples(cell, members), None)

    def replacements(self, sample_id: int, step: int, row: int, batch: np.ndarray) -> Iterator[int]:
        """Stand-ins of the same cell, chosen as `Mixture` chooses among a source."""
        _, cell, _ = self._place(step)
        n = int(self.sizes[cell])
        key = derive(self.seed, "replace", step)
        present = set(batch.tolist())

        positions = np.arange(row, min(n, row + _TRIED_AT_ONCE * len(batch)), len(batch))
        for candidate in self._samples(cell, permute(n, key, positions)).tolist():
            if candidate not in present:
                yield candidate

        # A cell hardly larger than the batch: share stand-ins with other rows, at last repeat.
        for may_be_present in (False, True):
            for i in range(n):
                (candidate,) = self._samples(cell, permute(n, key, np.array([i]))).tolist()
                if (candidate in present) == may_be_present and candidate != sample_id:
                    yield candidate

    def _place(self, step: int) -> tuple[int, int, int]:
        """(epoch, cell, which of the cell's batches in this epoch) of a step."""
        n_slots = len(self._cell_of_slot)
        epoch, position = divmod(step, n_slots)
        (slot,) = self._shuffled(n_slots, np.array([position]), "cells", epoch).tolist()

        cell = int(self._cell_of_slot[slot])
        # A cell's slots stand side by side: the distance from its first one is its turn.
        first_slot = int(np.searchsorted(self._cell_of_slot, cell))
        return epoch, cell, slot - first_slot

    def _samples(self, cell: int, i: np.ndarray) -> np.ndarray:
        """The samples at the positions `i` of a cell."""
        return self._members.numpy()[self._starts[cell] + i].astype(np.int64)

    def _shuffled(self, n: int, i: np.ndarray, purpose: str, *position: int) -> np.ndarray:
        if not self.shuffle:
            return i
        return permute(n, derive(self.seed, purpose, *position), i)


def _pooled(sizes: np.ndarray, batch: int) -> np.ndarray:
    """The new number of every cell, small ones pooled as `Cells` says."""
    pool_of = np.arange(len(sizes))
    open_pool: list[int] = []
    last_pool = None
    for cell in np.flatnonzero(sizes < batch).tolist():
        open_pool.append(cell)
        if sizes[open_pool].sum() >= batch:
            last_pool = open_pool[0]
            pool_of[open_pool] = last_pool
            open_pool = []

    # What remains is less than a batch by itself.
    if open_pool:
        pool_of[open_pool] = np.argmax(sizes) if last_pool is None else last_pool
    _, numbered = np.unique(pool_of, return_inverse=True)
    return numbered
