"""One training step: batch → embeddings → terms → gradients → update → scalars. The one place that
calls backward.

A rank's b rows of a step are embedded in m micro-batches, but the objective sees all of them in one
call, so the number of micro-batches changes memory and nothing else (BASIC, Pham et al. 2021;
GradCache, Gao et al. 2021):

    1. embed every micro-batch, for m > 1 without keeping activations;
    2. evaluate the objective once on all embeddings of the step, with embeddings, scale and bias as
       leaves;
    3. backpropagate ⟨embedding, gradient⟩ through each micro-batch, for m > 1 after embedding it
       again with the random numbers of the first time. The gradients of scale and bias enter once,
       with the last micro-batch, so that every parameter gets its gradient through the wrapped
       model and the ranks exchange gradients once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlp import dist, log
from vlp.engines import Engine
from vlp.fields import EMBEDDED, LABELS
from vlp.losses import Objective
from vlp.measurements import measurements
from vlp.models import embedding
from vlp.non_finite import (
    NonFiniteError,
    Statistics,
    message,
    nan_unless_finite,
    where_not_finite,
)
from vlp.seeds import derive
from vlp.teacher import Teacher
from vlp.types import Batch

__all__ = ["NonFiniteError", "Training", "train_step"]


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
    # keywords of the objective that no step changes
    constants: Mapping[str, float] = field(default_factory=dict)
    # the image tower does not run: the batch's teacher_image are its embeddings
    precomputed: bool = False
    may_skip: int = 0  # steps with NaN or infinity that are left out before one ends the run
    skipped: int = 0  # how many were


def train_step(training: Training, batch: Batch, measure: bool = False) -> dict[str, Tensor]:
    """Update the model on this rank's rows of one step; returns detached scalars.

    "loss", each term, "scale", "bias" (if any), "lr" and "grad_norm"; with `measure` also what
    `measurements` gives. Loss and terms are this rank's share: their mean over ranks is the value
    of the whole step.

    Where embeddings, loss or any gradient of any rank are not finite, nothing moves on any rank: no
    weight, no moment, no statistic of a batch norm, no state of the objective or the teacher. The
    step then counts as skipped, with a warning that names the samples; beyond `training.may_skip`
    of them NonFiniteError is raised on every rank instead.
    """
    engine, step = training.engine, training.step

    # The forward pass moves a batch norm's statistics before it is known that the step counts.
    statistics = Statistics(engine.model)
    micro_batches = [part.to(engine.device) for part in batch.split(training.micro_batches)]
    keep_graph = len(micro_batches) == 1

    # 1. Embed.
    with torch.set_grad_enabled(keep_graph):
        outputs = [embed(training, part, i) for i, part in enumerate(micro_batches)]

    # 2. One objective over all rows of the step. Its leaves cut the graph: the towers wait.
    leaves = {name: _leaf([output[name] for output in outputs], training) for name in outputs[0]}
    of_teacher = teacher_forward(training, micro_batches)
    constant: dict[str, Any] = {**labels(training, batch), **of_teacher, **training.constants}

    # Seeded anew: how often the towers drew depends on the number of micro-batches.
    torch.manual_seed(derive(training.seed, "objective", step, dist.rank()))
    total, terms, new_states = training.objective.evaluate(
        **views_first(leaves), **constant, step=step
    )
    gradients = gradients_of(total, leaves)

    # A NaN anywhere makes all gradients NaN, without waiting for the device.
    poison = nan_unless_finite([total, *leaves.values(), *gradients.values()])

    # 3. Through the towers.
    for i, part in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        # The attention's kind holds for backward too, which may recompute the towers.
        with engine.micro_batch(last), _attention(training):
            output = outputs[i] if keep_graph else embed(training, part, i)
            engine.backward(poison * surrogate(output, gradients, i, last))

    # 4. Update, which the engine leaves out if the norm of all gradients is not finite.
    lr = training.learning_rate(step)
    norm = engine.update(lr)

    # The terms' new states, like a queue or a moving average, hold only after a step that counts.
    if torch.isfinite(norm):
        training.objective.commit(new_states)
        if training.teacher is not None:
            training.teacher.follow(of_teacher, step)
    else:
        statistics.put_back()
        skip_or_stop(training, where_not_finite(leaves | constant, batch))
    training.step += 1

    # 5. What is logged.
    scalars = {"loss": total.detach(), **terms}
    scalars |= {name: value.detach() for name, value in leaves.items() if not value.ndim}
    if measure:
        scalars |= measurements(training.objective, batch, leaves)
    if training.may_skip:
        scalars["skipped"] = torch.tensor(training.skipped)
    return {**scalars, "lr": torch.tensor(lr), "grad_norm": norm}


def embed(training: Training, part: Batch, index: int) -> dict[str, Tensor]:
    """Everything the objective needs of micro-batch `index`, through the wrapped model in one call.

    Returns "image" and "text" [rows, D], further fields [rows, …, D], "scale" and (if the model has
    one) "bias" []. Dropout and patch drop are derived from (seed, step, micro-batch, rank), so that
    a second call repeats the first.
    """
    wanted = training.objective.needs | {"image", "text"}
    # Precomputed: the batch's embeddings stand for the image tower.
    stored = {"image": part.teacher_image} if training.precomputed else {}

    torch.manual_seed(derive(training.seed, "model", training.step, index, dist.rank()))
    with _arithmetic(training), _attention(training):
        return stored | embedding.embed(training.engine.model, part, wanted - stored.keys())


def labels(training: Training, batch: Batch) -> dict[str, Tensor]:
    """Labels and masks that the objective reads from the batch itself."""
    values = {name: getattr(batch, name) for name in LABELS}
    if "caption_ids" in training.objective.needs:
        values["caption_ids"] = batch.text[:, 1:]  # what follows the token that begins a text

    return {
        name: value.to(training.engine.device, non_blocking=True)
        for name, value in values.items()
        if value is not None
    }


def teacher_forward(training: Training, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """The teacher's embeddings of all micro-batches and its queue, without gradient and in the
    arithmetic of the towers.
    """
    if training.teacher is None:
        return {}

    with torch.no_grad(), _arithmetic(training), _attention(training):
        parts = [training.teacher.embed(part) for part in micro_batches]

    of_teacher = dict(parts[0])  # its scale is the same for all micro-batches
    for name, value in of_teacher.items():
        if value.ndim:
            of_teacher[name] = torch.cat([part[name] for part in parts])

    of_teacher |= training.teacher.queue
    return {
        name: _for_pairs(value, training) if value.ndim else value
        for name, value in of_teacher.items()
    }


def views_first(embedded: dict[str, Tensor]) -> dict[str, Tensor]:
    """The embeddings as terms read them: views [V, b, D], which micro-batches cut as [b, V, D]."""
    views = {name for name, row in EMBEDDED.items() if row.head}
    return {
        name: value.transpose(0, 1) if name in views else value for name, value in embedded.items()
    }


def gradients_of(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂total/∂leaf by name; of numbers, such as the scale, the mean over ranks. Collective."""
    values = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    gradients = dict(zip(leaves, values))

    # A scale's ceiling looks at the sign of its gradient, which must be the ranks' common one.
    for name, value in leaves.items():
        if not value.ndim:
            gradients[name] = dist.all_reduce(gradients[name], dist.world()) / dist.world_size()
    return gradients


def surrogate(
    output: dict[str, Tensor], gradients: dict[str, Tensor], index: int, last: bool
) -> Tensor:
    """A scalar whose gradient in the parameters is the objective's, as far as micro-batch `index`
    carries it.

    Σ_name ⟨output, gradient⟩ over this micro-batch's rows, and with the last one scale·∂L/∂scale +
    bias·∂L/∂bias.
    """
    total: Any = 0
    for name, value in output.items():
        if value.ndim:
            rows = slice(index * len(value), (index + 1) * len(value))
            total = total + (value * gradients[name][rows]).sum()
        else:
            # Times 0 before the last: ZeRO-3 adds a gradient that first comes later to what the
            # last step left there.
            total = total + value * (gradients[name] if last else 0)
    return total


def skip_or_stop(training: Training, lines: list[str]) -> None:
    """Count a step that was left out; raises NonFiniteError if it was one too many."""
    training.skipped += 1
    text = message(lines, training.step)

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


def _leaf(parts: list[Tensor], training: Training) -> Tensor:
    """The rows of all micro-batches as one leaf."""
    # Scale and bias are the same for all micro-batches, and stay float32.
    if parts[0].ndim == 0:
        return parts[0].detach().clone().requires_grad_()

    rows = torch.cat([part.detach() for part in parts])
    return _for_pairs(rows, training).requires_grad_()


def _for_pairs(rows: Tensor, training: Training) -> Tensor:
    """bf16 on CUDA, where the pairwise kernels multiply in it."""
    return rows.to(training.dtype) if rows.is_cuda else rows


def _arithmetic(training: Training) -> AbstractContextManager:
    in_bf16 = training.dtype == torch.bfloat16
    return torch.autocast(training.engine.device.type, torch.bfloat16, enabled=in_bf16)


def _attention(training: Training) -> AbstractContextManager:
    """On a CPU, the backward of torch's fused bf16 attention takes several times that of the plain
    one (torch 2.15, AMX).
    """
    plain = training.dtype == torch.bfloat16 and training.engine.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
