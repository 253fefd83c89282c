"""Batches that are a pure function of (seed, step): sources → rows of a step → decode, crop,
tokenize → `Batch`.

The data set that torch's DataLoader sees is indexed by step: item s is this rank's slice of global
batch s, or, where that is large, one of the parts of it that its processes make. So loader
processes, their number and their prefetching cannot change what a step holds, resuming is starting
at another number, and every rank has the same number of batches by construction. Never pass this
loader to accelerate's `prepare`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vlp import dist, log
from vlp.config import Data, Members
from vlp.data import nodes, row_numbers, sequence
from vlp.data.cores import usual_workers
from vlp.data.mix import Begin, Mixture
from vlp.data.modalities import Shapes, check_members
from vlp.data.modalities import check as check_modalities
from vlp.data.offered import (
    check_augment,
    check_pairs,
    optional_fields,
    read_fields,
    stored_teachers,
)
from vlp.data.processes import (
    SHARED_MEMORY,
    Feed,
    check_shared_memory,
    fitting_workers,
    n_parts,
)
from vlp.data.steps import DataAway, DataError, Report, Steps, joined
from vlp.lifetime import cut_short
from vlp.text_store import TextStore
from vlp.types import Batch, ImageSpec, TextSpec

__all__ = ["DataError", "Loader"]

# A batch that takes longer than this is a hang: a dead mount, a killed process.
_STALL_S = 900
_FREE_BAD_ROWS = 16  # unusable rows of a rank that end no run, however short it is
_MAX_NAMED = 100  # bad samples that are kept by name, and logged
_NAMED_IN_ERROR = 20
_CUT_TOLD_AFTER = 10_000  # texts, or the run's end: earlier a share would say little


def _never() -> bool:
    return False


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
        batch_key: str = "train.batch",  # of the configuration, for messages
        seed: int,
        rank: int = 0,
        world: int = 1,
        mixture: Callable[..., Mixture] = Mixture,
        # False: images are neither decoded nor carried (Batch.image has no pixels)
        pixels: bool = True,
        # by terms and selection: labels and texts that none of them reads are not made
        reads: frozenset[str] | None = None,
        # embeddings that take the place of the texts' tokens
        store: TextStore | None = None,
        # False: whatever crops teachers embedded, data.augment's with the whole picture's rows
        stored_crops: bool = True,
        # further modalities that the model reads: (T, F) of each by name
        modalities: Shapes = MappingProxyType({}),
        # those of them that are made of members of the samples
        decoded: Mapping[str, Members] = MappingProxyType({}),
        # False: of a longer sound the middle, in place of a piece drawn anew at every visit
        random_pieces: bool = True,
    ) -> None:
        if batch % world or not 0 <= rank < world:
            raise ValueError(
                f"a batch of {batch} cannot be cut for rank {rank} of {world}; "
                f"choose a multiple of {world}"
            )

        # Which sample stands in which row of which step.
        self.sources = [
            plugin.module.open(plugin.options, data.captions) for plugin in data.sources
        ]
        check_pairs(self.sources, data)
        data = row_numbers.with_form_of_concepts(data, self.sources)
        weights = [plugin.common.weight for plugin in data.sources]
        drawing = sequence.drawing(data, self.sources, batch // world, mixture)
        self._mixture = mixture(self.sources, weights, seed=seed, shuffle=data.shuffle, **drawing)
        self.n_samples = self._mixture.n_samples
        self._data, self._seed, self._rank, self._world = data, seed, rank, world
        self._batch_key = batch_key
        self.steps_per_epoch = self.epoch_steps(batch)

        # What a batch carries.
        self.store = store
        check_modalities([source.modalities for source in self.sources], modalities, decoded)
        self.modalities, self.decoded = modalities, decoded
        self._random_pieces = random_pieces
        # Looking takes a pass over the headers of all shards: only for a term that compares them.
        if decoded and (reads is None or "others" in reads):
            for source in self.sources:
                source.find_members(decoded)
            names = [plugin.name for plugin in data.sources]
            check_members(names, [source.members for source in self.sources], decoded)
        self.widths = optional_fields(self.sources, data, reads, modalities)
        self.carries = frozenset(self.widths)
        self._stored_crops = stored_crops
        if stored_crops:
            check_augment(self.sources, data.augment)
        # Of teacher_image and teacher_text; None and empty where they are not carried.
        stored = stored_teachers(self.sources)
        self.teacher_scale = None if stored is None else stored.scale
        self.teacher_shape = () if stored is None else stored.shape
        self.teachers = () if stored is None else stored.teachers
        self.teacher_widths = [teacher.width for teacher in self.teachers]

        # Made is only what is read: a bad score costs its sample only where a term reads scores.
        self._made_fields = self.widths if reads is None else read_fields(self.widths, reads)
        if store is not None and "text_views" in self._made_fields:
            raise ValueError(
                "data.views changes the words of captions, whose embeddings are stored; take "
                "data.views away, or a text tower that reads tokens"
            )
        self._pixels = pixels
        self._make(batch, image, text)
        nodes.check_room(self._mixture, rank, world)
        self._batches: list[tuple[int, int]] = [(0, batch)]
        self._content = [source.contents() for source in self._mixture.sources]

        # Where the run stands, and what was lost on the way.
        self._position = self._start = 0
        self._feed: Feed | None = None
        self._made: list[tuple[Batch, Report]] = []  # parts of the next step
        self._next: tuple[Batch, Report] | None = None  # made, not yet taken
        self._bad_share = data.bad_share
        # A source that waits longer ends the wait by itself, and says for what.
        patience_s = max(source.patience_s for source in self.sources)
        self._stall_s = max(_STALL_S, 2 * patience_s)
        # The first hundred bad samples: id, key, reason.
        self.bad: list[tuple[int, str, str]] = []
        self.n_left_out = sequence.n_left_out(self._mixture)
        self._cut_told = False
        self._reset_counters()

        # All ranks read the same sources.
        if rank == 0:
            self._warn_of_problems()
            self._warn_of_shared_shards(batch)

    def _make(self, batch: int, image: ImageSpec, text: TextSpec) -> None:
        """Make steps of `batch` rows of all ranks, of these pixels and tokens."""
        self._steps = Steps(
            self._mixture,
            self._data,
            image,
            text,
            batch,
            self._rank,
            self._world,
            self._made_fields,
            self._pixels,
            self.store,
            self._stored_crops,
            self.modalities,
            self.decoded,
            self._random_pieces,
        )
        self._rows = batch // self._world
        self._workers = self._start_workers(self._data, min(self._world, dist.local_world_size()))

    def enter(self, batches: list[tuple[int, int]], image: ImageSpec, text: TextSpec) -> None:
        """Go on with other batches, from the next one on. ValueError for a size that the ranks do
        not divide or that the data do not fill.

        batches: (first step, rows of all ranks) of every size that the run has had, the last of
        which is the one to come: what stood in the earlier ones decides what follows.
        """
        self.close()

        # From the beginning: where a size begins depends on all before it.
        self._mixture.begin(Begin(0, 0))
        for (_, earlier), (step, _) in pairwise(batches):
            self._mixture.begin(self._mixture.end(step, earlier))

        batch = batches[-1][1]
        self.steps_per_epoch = self.epoch_steps(batch)
        self._make(batch, image, text)
        self._batches = batches

    def epoch_steps(self, batch: int) -> int:
        """Steps of an epoch in batches of this size; ValueError for one that does not fit."""
        if batch % self._world or batch // self._world % self._data.together:
            unit = self._world * self._data.together
            raise ValueError(
                f"a batch of {batch} cannot be cut for {self._world} ranks in groups of "
                f"{self._data.together} rows; choose a multiple of {unit}"
            )
        steps = self._mixture.steps_per_epoch(batch)
        if not steps:
            too_few = sequence.too_few(self._mixture, batch, self._data.together, self._batch_key)
            raise ValueError(too_few)
        return steps

    def _identity(self, step: int) -> dict[str, Any]:
        """What the sequence up to `step` depends on, besides it."""
        # Of the sizes only those that were in use: what comes later may still be changed.
        used = [(first, batch) for first, batch in self._batches if first < step or not first]
        batches = used[0][1] if len(used) == 1 else [list(size) for size in used]
        return sequence.identity(self._mixture, self._data, batches, self._seed)

    def _start_workers(self, data: Data, n_ranks: int) -> int:
        """The number of loader processes of each of the `n_ranks` on this machine; divides the
        steps into parts for them. DataError where the shared memory is too small.
        """
        steps = self._steps
        if data.workers == "auto":
            usual = usual_workers(n_ranks)
            n_workers = fitting_workers(steps.nbytes, self._rows, usual, n_ranks)
            if n_workers < usual and dist.is_main():
                log.warn(
                    f"data.workers: auto takes {n_workers} process(es) a rank and not {usual}: "
                    f"more would fill {SHARED_MEMORY}; Docker gives 64 MB unless told --shm-size"
                )
        else:
            n_workers = data.workers

        # Before the first batch: a full /dev/shm kills loader processes without a word.
        steps.parts = n_parts(steps.nbytes, n_workers, self._rows)
        check_shared_memory(steps.nbytes, n_workers, n_ranks, parts=steps.parts)
        return n_workers

    def problems(self) -> list[str]:
        """Sentences on what the sources left out or found odd."""
        return sequence.problems(self._mixture)

    def __iter__(self) -> Loader:
        return self

    def wait(self, asked_to_stop: Callable[[], bool] = _never) -> bool:
        """Return once the next batch is here, or earlier where `asked_to_stop()`; then whether it
        is. DataError where none will come.
        """
        started = time.perf_counter()
        if self._feed is None:
            self._feed = self._new_feed()

        # Half a second at a time: a signal is answered also while a mount stalls.
        while self._next is None and not asked_to_stop():
            # Loader processes give control back twice a second; a batch that is made here does not,
            # and a signal may end the block before there is a part.
            part = None
            with nullcontext() if self._workers else cut_short():
                part = self._feed.poll()
            if part is not None:
                self._made.append(part)
            elif not self._workers:
                # Cut short in the middle of a batch, which a new feed makes from its beginning.
                self._feed = self._new_feed()
            if len(self._made) == self._steps.parts:
                self._next, self._made = joined(self._made), []

            waited_s = time.perf_counter() - started
            if self._next is None and waited_s > self._stall_s:
                raise DataAway(
                    f"step {self._position} took more than {self._stall_s:g} s to load: "
                    "a stalled disk, mount or server?"
                )
        self._waited_s += time.perf_counter() - started
        return self._next is not None

    def _new_feed(self) -> Feed:
        parts = self._steps.parts
        # Parts are page-locked when they are joined.
        pin = torch.cuda.is_available() and parts == 1
        return Feed(self._steps, self._position * parts, self._workers, pin)

    def __next__(self) -> Batch:
        self.wait()
        assert self._next is not None  # `wait` returns with a step, or not at all
        batch, report = self._next
        self._next = None

        self._position += 1
        self._n_truncated += report.n_truncated
        self._n_texts += report.n_texts
        self._fetched_bytes += report.fetched_bytes
        self._used_bytes += report.used_bytes
        self._count_bad(report)
        if self._n_texts >= _CUT_TOLD_AFTER:
            self._warn_of_cut()
        return batch

    def counters(self) -> dict[str, float]:
        """Since the start or the last `go_to`: samples replaced, captions cut, seconds waited."""
        return {
            "bad_samples": self._n_bad,
            "truncated_captions": self._n_truncated,
            "left_out_samples": self.n_left_out,
            "waited_s": self._waited_s,
        }

    def traffic(self) -> dict[str, Tensor]:
        """Since the start or the last `go_to`: bytes of remote shards that this rank fetched, and
        of samples that it read of them; empty where no shards are remote.
        """
        if not any(source.window for source in self.sources):
            return {}
        counts = {"fetched_bytes": self._fetched_bytes, "used_bytes": self._used_bytes}
        return {name: torch.tensor(float(n), dtype=torch.float64) for name, n in counts.items()}

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """The next step, or an earlier one to go on from, and what the sequence depends on;
        JSON-able, the same on all ranks.

        A few hundred bytes, and eight letters a shard.
        """
        content = ["".join(contents.digests) for contents in self._content]
        step = self._position if step is None else step
        return {"step": step, **self._identity(step), "content": content}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the state's step, on any number of ranks and workers; DataError where the
        sequence would differ.
        """
        saved = {name: value for name, value in state.items() if name not in ("step", "content")}
        step = int(state["step"])
        identity, saved = sequence.comparable(
            self._mixture, self._data, self._identity(step), saved
        )
        differences = sequence.differences(identity, saved, step)
        # A checkpoint from before there were digests says nothing of the content.
        for contents, digests in zip(self._content, state.get("content", [])):
            differences += contents.differing(digests)
        if differences:
            raise DataError(
                f"the run cannot continue on this data: {'; '.join(differences)}; "
                "restore it, or start a new run with init_from=CHECKPOINT"
                f"{sequence.of_another_version(differences)}"
            )

        # Of a run that began without lanes, a machine reads more at once.
        nodes.check_room(self._mixture, self._rank, self._world)
        self.go_to(step)

    def go_to(self, step: int) -> None:
        """Let the next batch be that of `step`, and count anew."""
        # Batches made ahead are those of the old position.
        self.close()
        self._position = self._start = step
        self._reset_counters()

    def close(self) -> None:
        """Stop the loader processes; the next batch starts them again."""
        self._warn_of_cut()
        # torch ends its processes when their iterator is let go.
        self._feed, self._next, self._made = None, None, []

    def _reset_counters(self) -> None:
        self._n_bad = self._n_truncated = self._n_texts = 0
        self._waited_s = 0.0
        self._fetched_bytes = self._used_bytes = 0

    def _warn_of_cut(self) -> None:
        """Say once a run which share of the captions does not fit the text tower."""
        if self._cut_told or not self._n_truncated or not dist.is_main():
            return

        self._cut_told = True
        share = self._n_truncated / self._n_texts
        log.warn(
            f"{self._n_truncated:,} of {self._n_texts:,} captions ({share:.1%}) were cut to "
            f"{self._steps.text.context_length} tokens; text_tower.context makes a pretrained "
            "tower read longer ones, captions.choose=sentences reads them in parts"
        )

    def _count_bad(self, report: Report) -> None:
        """Keep and log the bad samples of a batch; raises DataError where they became too many."""
        self._n_bad += len(report.bad)
        # Who goes back to the start meets the same ones again.
        new = [sample for sample in report.bad if sample not in self.bad]
        for sample_id, key, reason in new[: _MAX_NAMED - len(self.bad)]:
            self.bad.append((sample_id, key, reason))
            log.warn(f"sample {sample_id} {key!r} was replaced by another: {reason}")

        # A share alone would end a run at its first bad sample.
        n_rows = self._rows * (self._position - self._start)
        if self._n_bad <= _FREE_BAD_ROWS + self._bad_share * n_rows:
            return

        names = "\n".join(
            f"  sample {i} {key!r}: {reason}" for i, key, reason in self.bad[:_NAMED_IN_ERROR]
        )
        raise DataError(
            f"{self._n_bad} samples could not be used by step {self._position}:\n{names}\n"
            "repair or remove them"
        )

    def _warn_of_shared_shards(self, batch: int) -> None:
        if self._data.lanes == 1:  # as it was asked for
            return
        n_nodes = self._world // len(nodes.ranks_here(self._rank, self._world))
        shared = nodes.shared_shards(self._mixture, batch, n_nodes)
        if shared:
            log.warn(shared)

    def _warn_of_problems(self) -> None:
        problems = self.problems()
        if not problems:
            return

        lines = "".join(f"\n  {problem}" for problem in problems[:5])
        more = "\n  …" if len(problems) > 5 else ""
        lost = self.n_left_out or "no"
        log.warn(f"{lost} samples of the data are left out; what was found:{lines}{more}")
