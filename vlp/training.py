"""What a run changes step by step, and what its steps came to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vlp import dist, log
from vlp.engines import Engine
from vlp.losses import Objective
from vlp.non_finite import NonFiniteError, message, named
from vlp.online_judge import OnlineJudge
from vlp.teacher import Teacher
from vlp.verdict import Verdict


def nothing() -> None:
    pass


@dataclass
class Training:
    """The state that a step changes (the engine's model and optimiser, the objective's state, the
    step count) and its settings.
    """

    engine: Engine
    objective: Objective
    learning_rate: Callable[[int], float]  # of the step
    seed: int = 0
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32  # of the towers' arithmetic
    step: int = 0
    teacher: Teacher | None = None
    judge: OnlineJudge | None = None
    # keywords of the objective that no step changes
    constants: Mapping[str, Any] = field(default_factory=dict)
    # the image tower does not run: the batch's teacher_image are its embeddings
    precomputed: bool = False
    may_skip: int = 0  # steps with NaN or infinity that are left out before one ends the run
    skipped: int = 0  # how many were
    verdict: Verdict | None = None  # of the last step, which the host has not read yet
    asked_to_stop: bool = False  # any rank, as far as verdicts were read
    # Called before weights move: a checkpoint may still be copying them.
    before_update: Callable[[], None] = nothing


def settle(training: Training) -> None:
    """Wait for the last step and read what it came to: before a checkpoint, an evaluation or the
    end. Raises as `train_step`. Collective where something was not finite.
    """
    verdict, training.verdict = training.verdict, None
    conclude(training, verdict)


def conclude(training: Training, verdict: Verdict | None) -> None:
    """Take note of what a step came to, if there was one; raises NonFiniteError if it was one too
    many to skip.
    """
    if verdict is None:
        return
    norm, n_stop, n_void = verdict.numbers.read()
    training.asked_to_stop |= n_stop > 0

    # A rank had no rows: the step was none.
    if n_void:
        training.step -= 1
    elif not math.isfinite(norm):
        skip_or_stop(training, verdict)


def skip_or_stop(training: Training, verdict: Verdict) -> None:
    """Count a step that was left out; raises NonFiniteError if it was one too many. Collective."""
    training.skipped += 1
    text = message(named(verdict.bad_rows, verdict.sample_id, verdict.keys), verdict.step)

    if training.skipped <= training.may_skip:
        if dist.is_main():
            count = f"{training.skipped} of at most {training.may_skip}"
            log.warn(f"{text}\nThe step is left out, {count}.")
        return

    if training.may_skip:
        text += (
            f"\n{training.may_skip} such steps were left out before it, which is all that "
            "train.max_skipped allows."
        )
    raise NonFiniteError(text)
