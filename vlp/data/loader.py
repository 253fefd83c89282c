"""Batches that are a pure function of (seed, step): sources → rows of a step → decode, crop, tokenize → `Batch`.

The data set that torch's DataLoader sees is indexed by step: item s is this rank's slice of global batch s, whole. So
loader processes, their number and their prefetching cannot change what a step holds, resuming is starting at another
number, and every rank has the same number of batches by construction. Never pass this loader to accelerate's `prepare`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from vlp import log
from vlp.config import Data
from vlp.data import decode, text
from vlp.data.mix import Mixture
from vlp.data.sources import Source, text_list
from vlp.schema import plain
from vlp.seeds import derive
from vlp.types import Batch, ImageSpec, Sample, TextSpec

_TRIES = 64  # stand-ins for one bad sample before the data is called unusable
_STALL_S = 900  # a batch that takes longer than this is a hang: a dead mount, a killed process


class DataError(RuntimeError):
    """The data cannot be trained on: too many bad samples, a stalled shard, or a resumed run on other data."""


@dataclass
class Report:
    """What happened while one batch was made."""

    bad: list[tuple[int, str, str]]  # sample id, key where known, reason
    n_truncated: int


class Loader:
    """This rank's batches of an endless run over the configured data; an iterator.

    An epoch is `steps_per_epoch` = n_samples // batch steps; without weights every sample stands in it at most once, and
    n_samples mod batch samples, other ones each epoch, are left out. `carries` names the optional fields of its batches.
    A sample that cannot be read or decoded is replaced in place by another of its source and reported in `bad`; more
    than 16 + `bad_share` of the rows delivered so far end the run with a DataError that lists some of them.
    """

    def __init__(
        self,
        data: Data,
        image: ImageSpec,
        text: TextSpec,
        *,
        batch: int,  # B, over all ranks
        seed: int,
        rank: int = 0,
        world: int = 1,
        bad_share: float = 0.01,
    ) -> None:
        if batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} cannot be cut for rank {rank} of {world}; choose a multiple of {world}")
        sources = [plugin.module.open(plugin.options, data.captions) for plugin in data.sources]
        weights = [plugin.common.weight for plugin in data.sources]
        self._mixture = Mixture(sources, weights, seed=seed, shuffle=data.shuffle)
        self.n_samples = self._mixture.n_samples
        self.steps_per_epoch = self.n_samples // batch
        if not self.steps_per_epoch:
            raise ValueError(f"a batch of {batch} is larger than the data ({self.n_samples} samples); set train.batch lower")
        fields = _optional(sources)
        self.carries = frozenset(fields)
        self._steps = _Steps(self._mixture, data, image, text, batch, rank, world, fields)
        self._identity = _identity(self._mixture, data, batch, seed)
        self._workers, self._bad_share, self._rows = data.workers, bad_share, batch // world
        self.bad: list[tuple[int, str, str]] = []  # the first hundred bad samples: id, key, reason
        self.n_left_out = sum(source.n_left_out for source in sources)
        self._position = self._start = 0
        self._n_bad = self._n_truncated = 0
        self._waited_s = 0.0
        self._batches: Iterator[tuple[Batch, Report]] | None = None
        if rank == 0 and (found := self.problems()):
            lines = "".join(f"\n  {line}" for line in found[:5])
            log.warn(f"{self.n_left_out} samples of the data are left out; what was found:{lines}" + "\n  …" * (len(found) > 5))

    def problems(self) -> list[str]:
        """What the sources left out or found odd, in words."""
        return [text for source in self._mixture.sources for text in source.problems()]

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        if self._batches is None:
            self._batches = self._open()
        try:
            batch, report = next(self._batches)
        except RuntimeError as error:
            if "timed out" in str(error):
                raise DataError(f"step {self._position} took more than {_STALL_S} s to load: a stalled disk or mount?") from error
            raise
        self._waited_s += time.perf_counter() - started
        self._position += 1
        self._n_truncated += report.n_truncated
        self._n_bad += len(report.bad)
        for sample_id, key, reason in report.bad[: 100 - len(self.bad)]:
            self.bad.append((sample_id, key, reason))
            log.warn(f"sample {sample_id} {key!r} was replaced by another: {reason}")
        if self._n_bad > 16 + self._bad_share * self._rows * (self._position - self._start):
            names = "\n".join(f"  sample {i} {key!r}: {reason}" for i, key, reason in self.bad[:20])
            raise DataError(f"{self._n_bad} samples could not be used by step {self._position}:\n{names}\nrepair or remove them")
        return batch

    def counters(self) -> dict[str, float]:
        """Since the start or the last `load_state_dict`: bad samples replaced, captions truncated, seconds waited."""
        return {
            "bad_samples": self._n_bad, "truncated_captions": self._n_truncated,
            "left_out_samples": self.n_left_out, "waited_s": self._waited_s,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The next step and what the sequence depends on; JSON-able, a few hundred bytes, the same on all ranks."""
        return {"step": self._position, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the state's step, on any number of ranks and workers; DataError where the sequence would differ."""
        different = [f"{k} was {state.get(k)!r}, is {v!r}" for k, v in self._identity.items() if state.get(k) != v]
        if different:
            raise DataError(f"the run cannot continue on this data: {'; '.join(different)}; restore it or start a new run")
        self.close()
        self._position = self._start = int(state["step"])
        self._n_bad = self._n_truncated = 0
        self._waited_s = 0.0

    def close(self) -> None:
        """Stop the loader processes; the next batch starts them again."""
        self._batches = None

    def _open(self) -> Iterator[tuple[Batch, Report]]:
        options: dict[str, Any] = {}
        if self._workers:
            # A fork of a process that has used OpenMP, CUDA or threads can hang; a server that only has the imports cannot.
            context = torch.multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["vlp.data.loader", "open_clip"])
            options = {"multiprocessing_context": context, "prefetch_factor": 2, "timeout": _STALL_S}
        sampler = _From(self._position)
        options["pin_memory"] = torch.cuda.is_available()
        return iter(DataLoader(self._steps, batch_size=None, sampler=sampler, num_workers=self._workers, **options))


class _From(Sampler):
    """Steps from a number on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class _Steps(Dataset):
    """Item s: this rank's rows of step s, with a report. Sent to every loader process."""

    def __init__(
        self, mixture: Mixture, data: Data, image: ImageSpec, text: TextSpec, batch: int, rank: int, world: int,
        optional: dict[str, int],
    ) -> None:  # fmt: skip
        self.mixture, self.data, self.image, self.text, self.optional = mixture, data, image, text, optional
        self.size, self.rows = batch, range(rank * batch // world, (rank + 1) * batch // world)
        self.ahead = mixture.ahead(batch)
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}  # each process builds its own: its caches are large

    def __getitem__(self, step: int) -> tuple[Batch, Report]:
        self._tokenizer = self._tokenizer or text.build(self.text)
        ids = self.mixture.batch(step, self.size)
        if self.ahead:
            self.mixture.prepare(self.mixture.batch(step + self.ahead, self.size))
        report = Report([], 0)
        images = _new_pixels((len(self.rows), 3, *self.image.size))
        samples = [self._sample(step, row, ids, image, report) for row, image in zip(self.rows, images)]
        captions = [self._caption(sample, step, row) for sample, row in zip(samples, self.rows)]
        tokens, report.n_truncated = self._tokenizer.tokenize(captions)
        sample_id = torch.tensor([sample.sample_id for sample in samples])
        batch = Batch(images, tokens, sample_id, [sample.key for sample in samples], **self._extras(samples))
        return batch, report

    def _sample(self, step: int, row: int, ids: np.ndarray, out: Tensor, report: Report) -> Sample:
        """The sample of this row, or its first usable stand-in, with its pixels written to `out`."""
        wanted = int(ids[row])
        stand_ins = self.mixture.replacements(wanted, step, row, ids)
        for sample_id in itertools.chain([wanted], itertools.islice(stand_ins, _TRIES)):
            key = ""
            try:
                sample = self.mixture.read(sample_id)
                key = sample.key
                rng = random.Random(self._seed("pixels", step, row, sample_id))
                out.copy_(decode.train(sample.image, self.image, self.data.augment, rng))
                return sample
            except (OSError, ValueError) as error:
                report.bad.append((sample_id, key, f"{type(error).__name__}: {error}"))
        raise DataError(f"sample {wanted} and {_TRIES} stand-ins of its source are all bad; the last: {report.bad[-1]}")

    def _seed(self, purpose: str, step: int, row: int, sample_id: int) -> int:
        return derive(self.mixture.seed, purpose, step, row, sample_id)

    def _caption(self, sample: Sample, step: int, row: int) -> str:
        if self.data.captions.choose == "first" or len(sample.captions) == 1:
            return sample.captions[0]
        return sample.captions[self._seed("caption", step, row, sample.sample_id) % len(sample.captions)]

    def _extras(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The optional fields, from the samples' JSON."""
        result: dict[str, Tensor] = {}
        if k := self.optional.get("negatives", 0):
            texts = [text_list(sample.meta, "negatives")[:k] for sample in samples]
            result["negatives"] = self._tokens([row + [""] * (k - len(row)) for row in texts])
            result["negatives_valid"] = torch.tensor([[i < len(row) for i in range(k)] for row in texts])
        if c := self.optional.get("counterfactual", 0):
            texts = [text_list(sample.meta, "counterfactuals") for sample in samples]
            # A sample with fewer than C repeats its own, so that a valid row has C real texts.
            result["counterfactual"] = self._tokens([[row[i % len(row)] if row else "" for i in range(c)] for row in texts])
            result["counterfactual_valid"] = torch.tensor([bool(row) for row in texts])
        if "score" in self.optional:
            result["score"] = torch.tensor([float(sample.meta["score"]) for sample in samples], dtype=torch.float32)
        return result

    def _tokens(self, rows: list[list[str]]) -> Tensor:
        flat = self._tokenizer([text for row in rows for text in row])
        return flat.view(len(rows), -1, flat.shape[-1])


def _new_pixels(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a loader process already in the shared memory through which it will travel: one copy less."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def _optional(sources: list[Source]) -> dict[str, int]:
    """Optional fields that these sources fill, with their width."""
    fields = {}
    if k := max(source.n_negatives for source in sources):
        fields |= {"negatives": k, "negatives_valid": k}
    if c := max(source.n_counterfactuals for source in sources):
        fields |= {"counterfactual": c, "counterfactual_valid": c}
    if all(source.scored for source in sources):
        fields["score"] = 1
    return fields


def _identity(mixture: Mixture, data: Data, batch: int, seed: int) -> dict[str, Any]:
    """What the sequence of samples depends on, besides the step."""
    prints = [source.fingerprint() for source in mixture.sources]
    weights = [None if mixture.shares is None else str(share) for share in mixture.shares or prints]
    return {
        "samples": mixture.n_samples, "batch": batch, "seed": seed, "shuffle": data.shuffle, "weights": weights,
        "sources": hashlib.sha256("".join(prints).encode()).hexdigest()[:16],
        "captions": hashlib.sha256(json.dumps(plain(data.captions)).encode()).hexdigest()[:16],
    }  # fmt: skip
