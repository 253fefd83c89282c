"""`vlp train --dry-run`: everything up to the first steps, and what the run would take.

Three steps are made on real rows, in memory. Nothing of the run is written; an index of the data
that is missing is, beside the data, as in training.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vlp import dist, engines, log, stages
from vlp.assembly import Part, Run, begin, set_up
from vlp.checks import check_batch, check_teacher
from vlp.config import Config, Plan
from vlp.data import server
from vlp.engines.sharded import Sharded
from vlp.engines.zero import ZeRO
from vlp.files import existing
from vlp.measurements import peak_memory
from vlp.models.dual_encoder import DualEncoder
from vlp.out_of_memory import fitting
from vlp.staging import saved_bytes
from vlp.step import Training, settle, train_step
from vlp.types import Batch

STEPS = 3  # of which the first is left out of the time: it starts what later ones find ready
_GIB = 2**30


@dataclass
class Measured:
    """What the steps of a dry run came to, on this rank."""

    batch: Batch  # rows of a step, as they are trained on
    seconds: list[float] = field(default_factory=list)  # of each step, with the wait for its rows
    waited_s: list[float] = field(default_factory=list)  # of that, the wait
    kept_bytes: int | None = None  # most that was kept for backward at once; None: not measured


def dry_run(config: Config) -> None:
    """Set `config` up as training does, make a few steps and say what the run would take.
    Collective; raises as `vlp.train.train`.
    """
    server.start_for(config)
    engine = engines.start(config.train)
    check_batch(config)
    check_teacher(config)

    run = set_up(config, engine)
    try:
        # Of a run in stages, the one that comes next.
        segment = stages.left_of(run.segments, run.source)[0]
        part = begin(run, segment, run.source)
        measured = measure(run, part)
    finally:
        run.loader.close()

    # Collective, so before the first rank alone has the word.
    saved = saved_bytes(part.training)
    if dist.is_main():
        lines = [
            *shapes(part, measured.batch),
            *parameters(part.model),
            *memory(part, measured, saved),
            duration(segment.plan, part, measured),
            disk(config, segment.plan, sum(saved.values())),
            "dry run: nothing was written but the index of the data, where there was none",
        ]
        for line in lines:
            log.say(line)


def measure(run: Run, part: Part) -> Measured:
    """Make the run's first steps. Collective."""
    training, meter = part.training, KeptForBackward(part.model)
    measured: Measured | None = None

    for number in range(STEPS):
        started = time.perf_counter()
        loaded = next(run.loader)
        waited_s = time.perf_counter() - started

        batch, _ = part.selector.choose(training, loaded)
        measured = measured or Measured(batch)
        with fitting(run.config.train), metered(meter, run) if number == 0 else nullcontext():
            train_step(training, batch)
            settle(training)  # a GPU has only been asked until now
        measured.seconds.append(time.perf_counter() - started)
        measured.waited_s.append(waited_s)

    assert measured is not None, "STEPS is not 0"
    measured.kept_bytes = meter.peak_bytes or None
    return measured


def metered(meter: KeptForBackward, run: Run) -> AbstractContextManager:
    """Around a step whose saved tensors are measured, where they can be."""
    # Compiled blocks keep theirs where no hook sees them; of a GPU the allocator knows more.
    on_cpu = run.engine.device.type == "cpu"
    return meter if on_cpu and run.config.train.compile is not True else nullcontext()


class KeptForBackward(saved_tensors_hooks):
    """Measures how much autograd keeps for backward at once, parameters aside: `peak_bytes`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(self._keep, lambda kept: kept.tensor)
        self._of_model = {parameter.data_ptr() for parameter in model.parameters()}
        self._users: Counter[int] = Counter()  # of each piece of memory
        self._bytes = self.peak_bytes = 0

    def _keep(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._of_model:
            return _Kept(tensor)

        # Views of one piece of memory are kept once.
        if not self._users[place]:
            self._bytes += size
            self.peak_bytes = max(self.peak_bytes, self._bytes)
        self._users[place] += 1
        return _Kept(tensor, self, place, size)

    def let_go(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self._bytes -= size


class _Kept:
    """A tensor that autograd keeps, until it lets go of this."""

    def __init__(
        self, tensor: Tensor, meter: KeptForBackward | None = None, place: int = 0, size: int = 0
    ) -> None:
        self.tensor = tensor
        self._meter, self._place, self._size = meter, place, size

    def __del__(self) -> None:
        if self._meter is not None:
            self._meter.let_go(self._place, self._size)


# --- what is said ---------------------------------------------------------------------------------


def shapes(part: Part, batch: Batch) -> Iterator[str]:
    """What a rank's rows of a step are, and what becomes of them."""
    n_rows, parts = len(batch), part.training.micro_batches
    yield f"shapes, of the {n_rows} rows of a rank in a step ({parts} micro-batches):"
    for name in sorted(batch.carries() - {"key"}):
        value = getattr(batch, name)
        yield f"  {name:<16} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"

    n_candidates = part.training.objective.candidates(n_rows)
    yield f"  {'embeddings':<16} {[n_rows, part.model.embed_dim]} of images, and as many of texts"
    yield f"  {'scores':<16} {[n_rows, n_candidates]}: {n_candidates} candidates a row"


def parameters(model: DualEncoder) -> Iterator[str]:
    """Sizes of the model's parts, by whether they learn."""
    yield "parameters:"
    parts: dict[str, nn.Module | None] = {
        "image tower": model.visual,
        "text tower": model.text,
        "text decoder": model.text_decoder,
        "heads": model.heads,
        "scale and bias": model.scaling,
    }
    for name, part in parts.items():
        if part is None:
            continue
        n_trained, n_locked = n_parameters(part, trained=True), n_parameters(part, trained=False)
        if n_trained + n_locked:
            yield f"  {name:<16} {n_trained:,} trained, {n_locked:,} locked"


def n_parameters(part: nn.Module, trained: bool) -> int:
    """Parameters that learn, or that do not."""
    # DeepSpeed's third stage leaves an empty tensor in place of a whole one.
    sizes = (
        getattr(parameter, "ds_numel", parameter.numel())
        for parameter in part.parameters()
        if parameter.requires_grad == trained
    )
    return sum(sizes)


def memory(part: Part, measured: Measured, saved: dict[str, int]) -> Iterator[str]:
    """Memory of a rank: what follows from the bytes that are `saved`, and what was measured."""
    training, world = part.training, dist.world_size()
    whole = {
        "weights": saved["model"],
        "gradients": 4 * n_parameters(part.model, trained=True),  # float32
        "moments": saved["optimizer"],
    }

    yield "memory of a rank, GiB:"
    for name, n_bytes in whole.items():
        sharded = name in divided(training)
        share = n_bytes / world if sharded else n_bytes
        over = f", divided over {world} ranks" if sharded else ""
        yield f"  {name:<16} {share / _GIB:.3f} (from their sizes{over})"

    if measured.kept_bytes is not None:
        rows = len(measured.batch) // training.micro_batches
        kept = measured.kept_bytes / _GIB
        yield f"  {'activations':<16} {kept:.3f} (measured: kept for backward, {rows} rows at once)"
    for name, gib in peak_memory().items():
        of = "device" if "device" in name else "process"
        yield f"  {'peak':<16} {gib:.3f} of the {of} (measured over {STEPS} steps)"


def divided(training: Training) -> set[str]:
    """What the engine divides over ranks."""
    engine = training.engine
    if isinstance(engine, Sharded):
        return {"weights", "gradients", "moments"}
    if not isinstance(engine, ZeRO):
        return set()
    return {1: {"moments"}, 2: {"gradients", "moments"}}.get(
        engine.stage, {"weights", "gradients", "moments"}
    )


def duration(plan: Plan, part: Part, measured: Measured) -> str:
    """How long the run takes at the speed of the measured steps."""
    later = measured.seconds[1:]
    step_s = fmean(later)
    waited_s = fmean(measured.waited_s[1:])

    # The measured ones were none of the run's.
    done = part.training.step - len(measured.seconds)
    left = plan.end - done
    n_samples = left * plan.batch
    return (
        f"time: {step_s:.3g} s a step, {waited_s:.3g} s of it waiting for rows (the mean of "
        f"{len(later)} measured on this machine with real rows); {left:,} steps, "
        f"{n_samples:,} samples, {left / plan.steps_per_epoch:.2f} epochs: "
        f"{log.clock(left * step_s)}, without evaluation and saving"
    )


def disk(config: Config, plan: Plan, n_bytes: int) -> str:
    """What checkpoints take, beside the room that there is."""
    # An old checkpoint goes when the new one stands, and the best one stays.
    has_best = config.checkpoint.best is not None
    at_once = config.checkpoint.keep + (2 if has_best else 1)
    if config.checkpoint.keep_every is not None:
        at_once += len(plan.due_steps(config.checkpoint.keep_every))
    place = existing(Path(config.out))
    free = shutil.disk_usage(place).free
    verdict = "" if free > at_once * n_bytes else ": TOO LITTLE, set checkpoint.keep lower"
    return (
        f"disk: a checkpoint takes {n_bytes / 1e9:.3g} GB, at most {at_once} stand at once "
        f"({at_once * n_bytes / 1e9:.3g} GB); {free / 1e9:.3g} GB are free at {place}{verdict}"
    )
