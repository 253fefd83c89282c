"""Batches that are a pure function of (seed, step): sources → rows of a step → decode, crop,
tokenize → `Batch`.

The data set that torch's DataLoader sees is indexed by step: item s is this rank's slice of global
batch s, whole. So loader processes, their number and their prefetching cannot change what a step
holds, resuming is starting at another number, and every rank has the same number of batches by
construction. Never pass this loader to accelerate's `prepare`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from vlp import dist, log
from vlp.config import Data
from vlp.data.mix import Mixture
from vlp.data.processes import Feed, check_shared_memory
from vlp.data.sources import Source
from vlp.data.steps import DataError, Report, Steps, optional_fields, read_fields
from vlp.schema import plain
from vlp.types import Batch, ImageSpec, TextSpec

__all__ = ["DataError", "Loader"]

_STALL_S = 900  # a batch that takes longer than this is a hang: a dead mount, a killed process


class Loader:
    """This rank's batches of an endless run over the configured data; an iterator.

    `mixture` decides which samples a step holds (vlp.data.mix). An epoch is `steps_per_epoch` whole
    batches of all that is drawn: samples, or their captions, or groups of one origin. Without
    weights or replacement each stands in it at most once, and what is left after the last whole
    batch, other ones each epoch, is left out. `carries` names the optional fields that the data
    offer. A sample that cannot be read or decoded is replaced in place by another of its source and
    reported in `bad`; more than 16 + `data.bad_share` of the rows delivered so far end the run with
    a DataError that lists some of them.
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
        mixture: Callable[..., Mixture] = Mixture,
        # False: images are neither decoded nor carried (Batch.image has no pixels)
        pixels: bool = True,
        reads: frozenset[str]
        # by terms and selection: labels and texts that none of them reads are not made
        | None = None,
    ) -> None:
        if batch % world or not 0 <= rank < world:
            raise ValueError(
                f"a batch of {batch} cannot be cut for rank {rank} of {world}; choose a multiple of {world}"
            )
        sources = [plugin.module.open(plugin.options, data.captions) for plugin in data.sources]
        weights = [plugin.common.weight for plugin in data.sources]
        self.sources = sources
        self._mixture = mixture(
            sources,
            weights,
            seed=seed,
            shuffle=data.shuffle,
            **_drawing(data, batch // world, mixture),
        )
        self.n_samples = self._mixture.n_samples
        self.steps_per_epoch = self._mixture.steps_per_epoch(batch)
        if not self.steps_per_epoch:
            held = (
                f"{self.n_samples} samples"
                if data.together == 1
                else f"{self._mixture.n_units} groups of {data.together}"
            )
            raise ValueError(
                f"a batch of {batch} is larger than the data ({held}); set train.batch lower"
            )
        fields = optional_fields(sources, data)
        self.widths = fields  # of the optional fields that the data offer
        self.carries = frozenset(fields)
        self.teacher_scale = _teacher_scale(
            sources
        )  # of teacher_image and teacher_text; None: they are not carried
        made = fields if reads is None else read_fields(fields, reads)
        self._steps = Steps(self._mixture, data, image, text, batch, rank, world, made, pixels)
        self._identity = _identity(self._mixture, data, batch, seed)
        self._content = [source.contents() for source in self._mixture.sources]
        self._workers, self._bad_share, self._rows = data.workers, data.bad_share, batch // world
        self.bad: list[tuple[int, str, str]] = []  # the first hundred bad samples: id, key, reason
        self.n_left_out = sum(source.n_left_out for source in sources) + sum(
            units.n_left_out for units in self._mixture.units
        )
        self._position = self._start = 0
        self._n_bad = self._n_truncated = 0
        self._waited_s = 0.0
        self._feed: Feed | None = None
        self._next: tuple[Batch, Report] | None = None  # made, not yet taken
        check_shared_memory(self._steps.nbytes, self._workers, min(world, dist.local_world_size()))
        if rank == 0 and (found := self.problems()):
            lines = "".join(f"\n  {line}" for line in found[:5])
            more = "\n  …" if len(found) > 5 else ""
            lost = self.n_left_out or "no"
            log.warn(f"{lost} samples of the data are left out; what was found:{lines}{more}")

    def problems(self) -> list[str]:
        """What the sources left out or found odd, in words."""
        found = [text for source in self._mixture.sources for text in source.problems()]
        return found + [
            f"source {s}: {units.n_left_out} samples of origins with fewer than data.together = {self._mixture.together}"
            for s, units in enumerate(self._mixture.units)
            if units.n_left_out
        ]

    def __iter__(self) -> Loader:
        return self

    def wait(self, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Return once the next batch is here, or earlier where `asked_to_stop()`; raises DataError
        where none will come.
        """
        started = time.perf_counter()
        if self._feed is None:
            self._feed = Feed(self._steps, self._position, self._workers)
        while self._next is None and not asked_to_stop():
            self._next = self._feed.poll()
            if self._next is None and time.perf_counter() - started > _STALL_S:
                late = f"step {self._position} took more than {_STALL_S} s to load"
                raise DataError(f"{late}: a stalled disk, mount or server?")
        self._waited_s += time.perf_counter() - started

    def __next__(self) -> Batch:
        self.wait()
        batch, report = self._next
        self._next = None
        self._position += 1
        self._n_truncated += report.n_truncated
        self._n_bad += len(report.bad)
        for sample_id, key, reason in report.bad[: 100 - len(self.bad)]:
            self.bad.append((sample_id, key, reason))
            log.warn(f"sample {sample_id} {key!r} was replaced by another: {reason}")
        if self._n_bad > 16 + self._bad_share * self._rows * (self._position - self._start):
            names = "\n".join(f"  sample {i} {key!r}: {reason}" for i, key, reason in self.bad[:20])
            raise DataError(
                f"{self._n_bad} samples could not be used by step {self._position}:\n{names}\nrepair or remove them"
            )
        return batch

    def counters(self) -> dict[str, float]:
        """Since the start or the last `load_state_dict`: bad samples replaced, captions truncated,
        seconds waited.
        """
        return {
            "bad_samples": self._n_bad,
            "truncated_captions": self._n_truncated,
            "left_out_samples": self.n_left_out,
            "waited_s": self._waited_s,
        }

    def state_dict(self) -> dict[str, Any]:
        """The next step and what the sequence depends on; JSON-able, the same on all ranks.

        A few hundred bytes, and eight letters a shard.
        """
        content = ["".join(contents.digests) for contents in self._content]
        return {"step": self._position, **self._identity, "content": content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the state's step, on any number of ranks and workers; DataError where the
        sequence would differ.
        """
        identity = state.keys() - {"step", "content"}
        before, now = {k: v for k, v in state.items() if k in identity}, self._identity
        names = [*now, *(before.keys() - now.keys())]
        different = [
            f"{k} was {before.get(k)!r}, is {now.get(k)!r}"
            for k in names
            if before.get(k) != now.get(k)
        ]
        # A checkpoint from before there were digests says nothing of the content.
        for contents, digests in zip(self._content, state.get("content", [])):
            different += contents.differing(digests)
        if different:
            raise DataError(
                f"the run cannot continue on this data: {'; '.join(different)}; "
                "restore it, or start a new run with init_from=CHECKPOINT"
            )
        self.close()
        self._position = self._start = int(state["step"])
        self._n_bad = self._n_truncated = 0
        self._waited_s = 0.0

    def close(self) -> None:
        """Stop the loader processes; the next batch starts them again."""
        self._feed = self._next = None


def _drawing(data: Data, rows: int, mixture: Callable[..., Mixture]) -> dict[str, Any]:
    """How `mixture` is to draw, as far as it differs from whole epochs of single samples."""
    if rows % data.together:
        near = max(data.together, rows // data.together * data.together)
        raise ValueError(
            f"data.together is {data.together}, which does not divide a rank's {rows} rows: a group would cross to another "
            f"rank; use a train.batch of {near} a rank"
        )
    options = {
        "together": data.together,
        "every_caption": data.captions.choose == "all",
        "replacement": data.replacement,
    }
    options = {name: value for name, value in options.items() if value > (name == "together")}
    if options and mixture is not Mixture:
        raise ValueError(
            "a selection decides which samples a step holds; leave out data.together, data.replacement and captions.choose: all"
        )
    return options


def _teacher_scale(sources: list[Source]) -> float | None:
    teachers = {source.embeddings and source.embeddings.teacher for source in sources}
    if len(teachers) > 1:
        found = "; ".join(sorted(map(str, teachers)))
        raise ValueError(
            f"the sources' embeddings are of different models ({found}); give all the same teacher's, or none"
        )
    [teacher] = teachers
    return teacher and teacher.scale


def _identity(mixture: Mixture, data: Data, batch: int, seed: int) -> dict[str, Any]:
    """What the sequence of samples depends on, besides the step."""
    prints = [source.fingerprint() for source in mixture.sources]
    weights = [None if mixture.shares is None else str(share) for share in mixture.shares or prints]
    return {
        "samples": mixture.n_samples,
        "batch": batch,
        "seed": seed,
        "shuffle": data.shuffle,
        "weights": weights,
        "sources": hashlib.sha256("".join(prints).encode()).hexdigest()[:16],
        "captions": hashlib.sha256(json.dumps(plain(data.captions)).encode()).hexdigest()[:16],
        **mixture.identity(),
    }
