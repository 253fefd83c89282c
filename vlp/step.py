"""One training step: batch → embeddings → terms → gradients → update → scalars. The one place that
calls backward.

A rank's b rows of a step are embedded in m micro-batches, but the objective sees all of them in one call, so the
number of micro-batches changes memory and nothing else (BASIC, Pham et al. 2021; GradCache, Gao et al. 2021):

    1. embed every micro-batch, for m > 1 without keeping activations;
    2. evaluate the objective once on all embeddings of the step, with embeddings, scale and bias as leaves;
    3. backpropagate ⟨embedding, gradient⟩ through each micro-batch, for m > 1 after embedding it again with the random
       numbers of the first time. The gradients of scale and bias enter once, with the last micro-batch, so that every
       parameter gets its gradient through the wrapped model and the ranks exchange gradients once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlp import dist, log
from vlp.engines import Engine
from vlp.losses import Objective
from vlp.models import dual_encoder
from vlp.models.dual_encoder import IMAGES, TEXTS, VIEWS
from vlp.seeds import derive
from vlp.teacher import Teacher
from vlp.types import Batch

MEASURED = 512  # rows that `geometry` looks at
LABELS = (  # Batch fields handed to the objective as they are
    "negatives_valid", "counterfactual_valid", "sample_id", "score", "teacher_image", "teacher_text", "teacher_scores",
    "concept_targets",
)  # fmt: skip


class NonFiniteError(RuntimeError):
    """Embeddings, loss or gradients with NaN or infinity; nothing was updated."""


@dataclass
class Training:
    """What a step changes (the engine's model and optimiser, the objective's state, the step count)
    and its settings.
    """

    engine: Engine
    objective: Objective
    learning_rate: Callable[[int], float]  # of the step
    seed: int = 0
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32  # of the towers' arithmetic
    step: int = 0
    teacher: Teacher | None = None
    constants: Mapping[str, float] = field(
        default_factory=dict
    )  # keywords of the objective that no step changes
    precomputed: bool = (
        False  # the image tower does not run: the batch's teacher_image are its embeddings
    )
    may_skip: int = 0  # steps with NaN or infinity that are left out before one ends the run
    skipped: int = 0  # how many were


def train_step(training: Training, batch: Batch, measure: bool = False) -> dict[str, Tensor]:
    """Update the model on this rank's rows of one step; returns detached scalars.

    "loss", each term, "scale", "bias" (if any), "lr" and "grad_norm"; with `measure` also "log_n",
    what a row's term is worth when nothing is known, "valid.negatives" and "valid.counterfactual",
    the shares of this rank's texts that take part, and `geometry`. Loss and terms are this rank's
    share: their mean over ranks is the value of the whole step.

    Where embeddings, loss or any gradient of any rank are not finite, nothing moves on any rank: no
    weight, no moment, no statistic of a batch norm, no state of the objective or the teacher. The
    step then counts as skipped, with a warning that names the samples; beyond `training.may_skip`
    of them NonFiniteError is raised on every rank instead.
    """
    engine, step = training.engine, training.step
    statistics = [(buffer, buffer.clone()) for buffer in batch_statistics(engine.model)]
    micro = [part.to(engine.device) for part in batch.split(training.micro_batches)]
    keep_graph = len(micro) == 1

    # 1. Embed.
    with torch.set_grad_enabled(keep_graph):
        outputs = [embed(training, part, i) for i, part in enumerate(micro)]

    # 2. One objective over all rows of the step.
    leaves = {name: _leaf([output[name] for output in outputs], training) for name in outputs[0]}
    taught = learn(training, micro)
    torch.manual_seed(derive(training.seed, "objective", step, dist.rank()))
    views_first = {
        name: value.transpose(0, 1) for name, value in leaves.items() if name in VIEWS
    }  # [V, b, D]
    given = labels(training, batch) | taught | training.constants
    total, terms, moves = training.objective.evaluate(**leaves | views_first, **given, step=step)
    gradients = dict(
        zip(leaves, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True))
    )
    for (
        name,
        value,
    ) in (
        leaves.items()
    ):  # a scale's ceiling looks at the gradient's sign: it must be the ranks' common one
        if not value.ndim:
            gradients[name] = dist.all_reduce(gradients[name], dist.world()) / dist.world_size()
    poison = nan_unless_finite([total, *leaves.values(), *gradients.values()])

    # 3. Through the towers.
    for i, part in enumerate(micro):
        last = i == len(micro) - 1
        with (
            engine.micro_batch(last),
            _attention(training),
        ):  # around backward too: it may recompute the towers
            output = outputs[i] if keep_graph else embed(training, part, i)
            engine.backward(poison * surrogate(output, gradients, i, last))

    # 4. Update, which the engine leaves out if the norm of all gradients is not finite.
    lr = training.learning_rate(step)
    norm = engine.update(lr)
    if torch.isfinite(norm):
        training.objective.commit(moves)
        if training.teacher is not None:
            training.teacher.follow(taught, step)
    else:
        for buffer, before in statistics:
            buffer.copy_(before)
        skip_or_stop(training, where_not_finite(leaves, given, batch))
    training.step += 1

    shown = {name: value.detach() for name, value in leaves.items() if not value.ndim}
    if measure:
        shown |= {
            f"valid.{name}": getattr(batch, mask).float().mean()
            for name, mask in dual_encoder.VALID.items()
            if name in leaves
        }
        shown |= {"log_n": torch.tensor(math.log(training.objective.candidates(len(batch))))}
        shown |= geometry(leaves["image"].detach(), leaves["text"].detach())
    if training.may_skip:
        shown["skipped"] = torch.tensor(training.skipped)
    return {"loss": total.detach(), **terms, **shown, "lr": torch.tensor(lr), "grad_norm": norm}


def embed(training: Training, part: Batch, index: int) -> dict[str, Tensor]:
    """Everything the objective needs of micro-batch `index`, through the wrapped model in one call.

    Returns "image" and "text" [rows, D], further fields [rows, …, D], "scale" and (if the model has
    one) "bias" []. Dropout and patch drop are derived from (seed, step, micro-batch, rank), so that
    a second call repeats the first.
    """
    wanted = training.objective.needs | {"image", "text"}
    given = {"image": part.teacher_image} if training.precomputed else {}
    torch.manual_seed(derive(training.seed, "model", training.step, index, dist.rank()))
    with _arithmetic(training), _attention(training):
        return given | dual_encoder.embed(training.engine.model, part, wanted - given.keys())


def labels(training: Training, batch: Batch) -> dict[str, Tensor]:
    """What the objective reads of the batch itself."""
    found = {name: getattr(batch, name) for name in LABELS if getattr(batch, name) is not None}
    if "caption_ids" in training.objective.needs:
        found["caption_ids"] = batch.text[:, 1:]
    return {
        name: value.to(training.engine.device, non_blocking=True) for name, value in found.items()
    }


def geometry(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """How this rank's embeddings [b, D] lie: gap ‖mean x − mean t‖, alignment mean ‖x_i − t_i‖²,
    and uniformity log mean_{i<j} e^{−2‖x_i − x_j‖²} of images and of texts (Wang & Isola 2020),
    from the first MEASURED rows.

    2·MEASURED²·D multiplications, 0.5 GFLOP at D = 512, and only where a step is logged.
    """
    image, text = (rows[:MEASURED].float() for rows in (image, text))
    found = {
        "gap": (image.mean(0) - text.mean(0)).norm(),
        "alignment": (image - text).square().sum(1).mean(),
    }
    for name, rows in (("image", image), ("text", text)):
        if len(rows) > 1:
            squares = (
                2
                - 2
                * (rows @ rows.T)[
                    torch.ones(len(rows), len(rows), device=rows.device).triu(1).bool()
                ]
            )
            found[f"uniformity_{name}"] = (-2 * squares).exp().mean().log()
    return {f"space.{name}": value for name, value in found.items()}


def learn(training: Training, micro: list[Batch]) -> dict[str, Tensor]:
    """What the teacher gives for all micro-batches, without gradient and in the arithmetic of the
    towers.
    """
    if training.teacher is None:
        return {}
    with torch.no_grad(), _arithmetic(training), _attention(training):
        parts = [training.teacher.embed(part) for part in micro]
    joined = {
        name: torch.cat([part[name] for part in parts]) if value.ndim else value
        for name, value in parts[0].items()
    }
    return {
        name: _for_pairs(value, training) if value.ndim else value
        for name, value in (joined | training.teacher.queue).items()
    }


def _arithmetic(training: Training) -> AbstractContextManager:
    return torch.autocast(
        training.engine.device.type, torch.bfloat16, enabled=training.dtype == torch.bfloat16
    )


def _attention(training: Training) -> AbstractContextManager:
    """On a CPU, the backward of torch's fused bf16 attention takes several times that of the plain
    one (torch 2.15, AMX).
    """
    plain = training.dtype == torch.bfloat16 and training.engine.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def _leaf(parts: list[Tensor], training: Training) -> Tensor:
    """The rows of all micro-batches as one leaf."""
    if parts[0].ndim == 0:  # scale and bias are the same for all micro-batches, and stay float32
        return parts[0].detach().clone().requires_grad_()
    return _for_pairs(torch.cat([part.detach() for part in parts]), training).requires_grad_()


def _for_pairs(rows: Tensor, training: Training) -> Tensor:
    """bf16 on CUDA, where the pairwise kernels multiply in it."""
    return rows.to(training.dtype) if rows.is_cuda else rows


def surrogate(
    output: dict[str, Tensor], gradients: dict[str, Tensor], index: int, last: bool
) -> Tensor:
    """A scalar whose gradient in the parameters is the objective's, as far as micro-batch `index`
    carries it.

    Σ_name ⟨output, gradient⟩ over this micro-batch's rows, and with the last one scale·∂L/∂scale +
    bias·∂L/∂bias.
    """
    total = 0
    for name, value in output.items():
        if value.ndim:
            rows = slice(index * len(value), (index + 1) * len(value))
            total = total + (value * gradients[name][rows]).sum()
        # times 0 before the last: ZeRO-3 adds a gradient that first comes later to what the last
        # step left there
        else:
            total = total + value * (gradients[name] if last else 0)
    return total


def batch_statistics(module: torch.nn.Module) -> list[Tensor]:
    """The buffers that a forward pass of a training model moves."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers()]


def nan_unless_finite(values: list[Tensor]) -> Tensor:
    """1.0 on every rank where all values of all ranks are finite, else NaN: [] float32. Collective,
    without a wait.

    As a factor of what is backpropagated it makes the norm of the gradient tell the whole story, so
    that one check by the engine guards the update.
    """
    finite = torch.stack([torch.isfinite(value).all() for value in values]).all()
    n_bad = dist.all_reduce((~finite).float(), dist.world())
    return torch.where(n_bad > 0, torch.nan, torch.ones_like(n_bad))


def where_not_finite(leaves: dict[str, Tensor], given: dict[str, Any], batch: Batch) -> list[str]:
    """Which tensors of which samples of all ranks are not finite, in words. Collective."""
    lines = []
    for name, value in (leaves | given).items():
        if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
            continue
        bad_rows = (
            (~torch.isfinite(value)).flatten(1).any(1) if value.ndim > 1 else ~torch.isfinite(value)
        )
        for row in bad_rows.nonzero().flatten().tolist():
            of = f"row {row}"
            if len(value) == len(batch):
                of = f"of sample {batch.sample_id[row].item()} ({batch.key[row]})"
            lines.append(f"{_described(name)} {of}")
    return [line for of_rank in dist.gather_objects(lines) for line in of_rank]


def skip_or_stop(training: Training, lines: list[str]) -> None:
    """Count a step that was left out; raises NonFiniteError if it was one too many."""
    training.skipped += 1
    named = "\n  ".join(lines[:20])
    if not lines:
        named = "no embedding: an overflow in the loss (scale, bias, weights of the terms) or in the towers' backward pass"
    if len(lines) > 20:
        named += f"\n  … and {len(lines) - 20} more"
    place = f"NaN or infinity at step {training.step}; nothing was updated:\n  {named}"
    if training.skipped <= training.may_skip:
        if dist.is_main():
            log.warn(
                f"{place}\nThe step is left out, {training.skipped} of at most {training.may_skip}."
            )
        return
    if training.may_skip:
        place += f"\n{training.may_skip} such steps were left out before it, which is all that train.max_skipped allows."
    raise NonFiniteError(place)


def _described(name: str) -> str:
    tower = "image" if "image" in name else "text"
    return f"{name} embedding ({tower} tower)" if name in (*IMAGES, *TEXTS, *VIEWS) else name


def means_over_ranks(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Plain numbers, averaged over ranks: by the averaging convention, the values of the whole
    step. Collective.
    """
    stacked = torch.stack([value.detach().float().cpu() for value in scalars.values()])
    return dict(zip(scalars, _mean(stacked)))


def _mean(values: Tensor) -> list[float]:
    if dist.world_size() == 1:
        return values.tolist()
    gathered = dist.gather_objects(values.tolist())
    return [sum(column) / len(column) for column in zip(*gathered)]
