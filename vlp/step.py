"""One training step: batch → embeddings → terms → gradients → update → scalars. The one place that
calls backward.

A rank's b rows of a step are embedded in m micro-batches, but the objective sees all of them in one
call, so the number of micro-batches changes memory and nothing else (BASIC, Pham et al. 2021;
GradCache, Gao et al. 2021):

    1. embed every micro-batch, keeping the activations of the last one only;
    2. evaluate the objective once on all embeddings of the step, with embeddings, scale and bias as
       leaves;
    3. backpropagate ⟨embedding, gradient⟩ through each micro-batch, the kept one first, the others
       after embedding them again with the random numbers of the first time. The gradients of scale
       and bias enter once, with the last of them, so that every parameter gets its gradient through
       the wrapped model and the ranks exchange gradients once.

The host asks the device for nothing on the way: whether the step counts is decided there, and read
a step later (vlp.verdict).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlp import dist
from vlp.copies import copied
from vlp.measurements import measurements
from vlp.non_finite import NonFiniteError, Statistics, all_finite, bad_rows
from vlp.passes import (
    as_terms_read,
    attention,
    embed,
    first_pass,
    judged,
    labels,
    leaf,
    passed,
    rehearse,
    surrogate,
    teacher_forward,
)
from vlp.seeds import derive
from vlp.training import Training, conclude, settle
from vlp.types import Batch
from vlp.verdict import Readback, Verdict, agree

__all__ = ["NonFiniteError", "Training", "settle", "train_step"]


def train_step(
    training: Training,
    batch: Batch,
    measure: bool = False,
    *,
    stop: bool = False,
    void: bool = False,
) -> dict[str, Tensor]:
    """Update the model on this rank's rows of one step; returns detached scalars.

    "loss", each term, "scale", "bias" (if any), "lr" and "grad_norm"; with `measure` also what
    `measurements` and `passed` give. Loss and terms are this rank's share: their mean over ranks is
    the value of the whole step.

    Where embeddings, loss or any gradient of any rank are not finite, nothing moves on any rank: no
    weight, no moment, no statistic of a batch norm, no state of the objective or the teacher. The
    next step, or `settle`, then counts this one as skipped, with a warning that names the samples;
    beyond `training.may_skip` of them it raises NonFiniteError on every rank instead.

    stop: this rank was asked to stop, which all ranks learn with the verdict
    (`training.asked_to_stop`). void: it has no rows of its own and `batch` stands in, so that ranks
    that do have rows are not left waiting: nothing moves, and the step is none.
    """
    engine, step = training.engine, training.step

    # 1. Embed. The forward pass moves a batch norm's statistics before it is known that the step
    # counts.
    statistics = Statistics(engine.model)
    on_device = copied(batch, engine.device)
    micro_batches = on_device.split(training.micro_batches)
    if engine.rehearses:
        rehearse(training, micro_batches[0])
    outputs, texts_begun = first_pass(training, micro_batches)

    # 2. One objective over all rows of the step. Its leaves cut the graph: the towers wait.
    leaves = {name: leaf(name, outputs, training) for name in outputs[0]}
    of_teacher = teacher_forward(training, micro_batches)
    constant = {**labels(training, micro_batches), **of_teacher, **training.constants}
    of_judge = judged(training, training.objective, on_device, leaves | constant, step)

    # Seeded anew: how often the towers drew depends on the number of micro-batches.
    torch.manual_seed(derive(training.seed, "objective", step, dist.rank()))
    total, terms, new_states = training.objective.evaluate(
        **as_terms_read(leaves | constant | of_judge), step=step, texts_begun=texts_begun
    )
    del texts_begun  # the texts of all ranks: backward through the towers needs their memory
    gradients = gradients_of(total, leaves)

    # A NaN on any rank makes all gradients NaN, and the update is left out for it.
    finite = all_finite([total, *leaves.values(), *gradients.values()])
    numbers = {name: gradients[name] for name, value in leaves.items() if not value.ndim}
    agreed = agree(numbers, ~finite, stop=stop, void=void)
    gradients |= agreed.numbers

    # 3. Through the towers. What was kept goes first: the others need its memory.
    kept = len(micro_batches) - 1
    order = [kept, *range(kept)]
    for i in order:
        last = i == order[-1]
        # The attention's kind holds for backward too, which may recompute the towers.
        with engine.micro_batch(last), attention(training):
            output = outputs[i] if i == kept else embed(training, micro_batches[i], i)
            engine.backward(agreed.poison * surrogate(output, gradients, i, last))

    # 4. Update, unless the norm of all gradients is not finite; the same goes for all else that
    # moves, like a queue or a moving average.
    lr = training.learning_rate(step)
    training.before_update()
    norm = engine.update(lr)
    counts = torch.isfinite(norm).to(engine.device)
    statistics.put_back_unless(counts)
    training.objective.commit(new_states, counts)
    if training.teacher is not None:
        training.teacher.follow({**constant, "pixels": on_device.image}, step, counts)
    training.step += 1

    # 5. The verdict of the step before, while the device still works on this one.
    numbers_to_read = Readback([norm.to(engine.device), agreed.n_stop, agreed.n_void])
    bad = bad_rows(leaves | constant, len(batch))
    before, training.verdict = (
        training.verdict,
        Verdict(step, numbers_to_read, bad, batch.sample_id, batch.key),
    )
    conclude(training, before)

    # 6. What is logged.
    scalars = {"loss": total.detach(), **terms}
    scalars |= {name: value.detach() for name, value in leaves.items() if not value.ndim}
    if measure:
        scalars |= measurements(training.objective, batch, leaves)
        scalars |= passed(training, micro_batches)
    return {**scalars, "lr": torch.tensor(lr), "grad_norm": norm}


def gradients_of(total: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """∂total/∂leaf of this rank by name."""
    values = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, values))
