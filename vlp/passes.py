"""The passes of a step through the towers: what goes in, what comes out, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlp import dist
from vlp.fields import FIELDS, LABELS
from vlp.losses import Objective
from vlp.models import embedding
from vlp.non_finite import Statistics
from vlp.pairwise import Pairs, reduction
from vlp.seeds import derive
from vlp.training import Training
from vlp.types import Batch


def first_pass(
    training: Training, micro_batches: list[Batch]
) -> tuple[list[dict[str, Tensor]], dist.Gathering | None]:
    """`embed` of every micro-batch: without activations, but for the last one, whose backward then
    needs no second forward; and the exchange of all texts, begun before the last pictures pass,
    where the objective is known to gather them.
    """
    kept = len(micro_batches) - 1
    outputs: list[dict[str, Tensor]] = []
    texts = TextGathering(training, outputs)
    for i, part in enumerate(micro_batches):
        # Ranks exchange gradients at the end of the second pass, which is here only if there is
        # none. DDP decides that in the forward.
        with torch.set_grad_enabled(i == kept), training.engine.micro_batch(last=kept == 0):
            outputs.append(embed(training, part, i, texts.begin if i == kept else None))
    return outputs, texts.begun


class TextGathering:
    """The exchange of a step's texts, begun when the last of them are embedded."""

    def __init__(self, training: Training, outputs: list[dict[str, Tensor]]) -> None:
        """`outputs`: of the micro-batches before the last one, at the latest when that begins."""
        self._training, self._outputs = training, outputs
        self._group = training.objective.gathers_texts_in(training.step)
        self.begun: dist.Gathering | None = None

    @property
    def begin(self) -> Callable[[Tensor], None] | None:
        """To be called with the texts of the last micro-batch, [rows, D]; None: nobody gathers."""
        return None if self._group is None else self._begin

    def _begin(self, last: Tensor) -> None:
        assert self._group is not None
        parts = [*(output["text"] for output in self._outputs), last]
        self.begun = dist.Gathering(rows_of("text", parts, self._training), self._group)


def rehearse(training: Training, part: Batch) -> None:
    """One backward whose gradients are zeros and count nowhere. Collective.

    DDP lays gradients out anew after its first backward, in the order in which they came. A sum of
    more than two numbers depends on where it lies: without this the first step after a resume would
    differ in its last bits from the same step of a run that was not stopped.
    """
    statistics = Statistics(training.engine.model)
    with training.engine.micro_batch(last=True), attention(training):
        output = embed(training, part, 0)
        zeros = [(value * 0).sum() for value in output.values()]
        training.engine.backward(torch.stack(zeros).sum())
    training.engine.forget()
    statistics.put_back_unless(torch.zeros((), dtype=torch.bool, device=training.engine.device))


def embed(
    training: Training,
    part: Batch,
    index: int,
    on_text: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Everything the objective needs of micro-batch `index`, through the wrapped model in one call.

    Returns "image" and "text" [rows, D], further fields [rows, …, D], "scale" and (if the model has
    one) "bias" []. Dropout and patch drop are derived from (seed, step, micro-batch, rank), so that
    a second call repeats the first. on_text: as in `vlp.models.embedding.embed`.
    """
    torch.manual_seed(derive(training.seed, "model", training.step, index, dist.rank()))
    return embed_by(training, training.engine.model, part, on_text)


def embed_by(
    training: Training,
    model: nn.Module,
    part: Batch,
    on_text: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """`embed` by any model of the run, in the arithmetic of the towers."""
    # Precomputed: the batch's embeddings stand for the image tower.
    stored = {"image": part.teacher_image} if training.precomputed else {}
    with _arithmetic(training), attention(training):
        return stored | embedding.embed(model, part, _wanted(training, part), on_text)


def passed(training: Training, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """What this rank's rows of a step are to the towers, each counted once: "pictures" and
    "text_tokens", [].
    """
    counts = [
        embedding.passes_towers(training.engine.model, part, _wanted(training, part))
        for part in micro_batches
    ]
    n_pictures, n_tokens = map(sum, zip(*counts))
    return {"pictures": torch.tensor(n_pictures), "text_tokens": torch.tensor(n_tokens)}


def _wanted(training: Training, part: Batch) -> frozenset[str]:
    """The fields of a batch that the towers embed."""
    by_tower = {"text"} if training.precomputed else {"image", "text"}
    # What a term reads where it is there.
    views = embedding.further_views(training.engine.model, part)
    optional = training.objective.reads.intersection([*embedding.OF_PAIRS, *views])
    return training.objective.needs | optional | by_tower


def labels(training: Training, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """Labels and masks that the objective reads from the batch itself, of all rows."""
    parts = {name: [getattr(part, name) for part in micro_batches] for name in LABELS}
    if "caption_ids" in training.objective.needs:
        # What follows the token that begins a text.
        parts["caption_ids"] = [part.text[:, 1:] for part in micro_batches]

    model, reads = training.engine.model, training.objective.reads
    masks = [embedding.token_masks(model, part, reads) for part in micro_batches]
    parts |= {name: [mask[name] for mask in masks] for name in masks[0]}
    return {name: joined(values) for name, values in parts.items() if values[0] is not None}


def teacher_forward(training: Training, micro_batches: list[Batch]) -> dict[str, Tensor]:
    """The teacher's embeddings of all micro-batches and its queue, without gradient and in the
    arithmetic of the towers.
    """
    if training.teacher is None:
        return {}

    with torch.no_grad(), _arithmetic(training), attention(training):
        parts = [training.teacher.embed(part) for part in micro_batches]

    of_teacher = dict(parts[0])  # its scale is the same for all micro-batches
    for name in of_teacher:
        if not FIELDS[name].is_number:
            of_teacher[name] = joined([part[name] for part in parts])

    of_teacher |= training.teacher.queue
    return {name: _for_pairs(name, value, training) for name, value in of_teacher.items()}


def judged(
    training: Training,
    objective: Objective,
    batch: Batch,
    rows: Mapping[str, Tensor],
    step: int | None,
) -> dict[str, Tensor]:
    """What the run's judge says of all rows of a step, of which `rows` are the embeddings, and of
    the candidates that these find hardest.
    """
    if training.judge is None:
        return {}
    return training.judge.scores(batch, rows, Pairs.at(objective.backend, step))


def as_terms_read(values: Mapping[str, Any]) -> dict[str, Any]:
    """Embeddings and labels of all rows in the shapes of terms: views [V, b, D], modalities
    [O, b, D] and their translations [X, b, D], which micro-batches cut as [b, V, D] and so on; and
    which samples have them.
    """
    turned = {
        name for name, row in FIELDS.items() if row.tower and row.shapes[0].split()[1:2] == ["b"]
    }
    keywords = {
        name: value.transpose(0, 1) if name in turned else value for name, value in values.items()
    }
    if "modality_lengths" in keywords:
        keywords["others_valid"] = keywords["modality_lengths"].T > 0
    return keywords


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


def joined(parts: list[Tensor]) -> Tensor:
    """The rows of all micro-batches; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def leaf(name: str, outputs: list[dict[str, Tensor]], training: Training) -> Tensor:
    """Field `name` of all micro-batches as one leaf."""
    parts = [output[name] for output in outputs]
    # Scale and bias are the same for all micro-batches, and the optimiser changes them in place.
    if parts[0].ndim == 0:
        return parts[0].detach().clone().requires_grad_()

    return rows_of(name, parts, training).requires_grad_()


def rows_of(name: str, parts: list[Tensor], training: Training) -> Tensor:
    """Field `name` of all micro-batches as the objective reads it, without gradient."""
    rows = joined([part.detach() for part in parts])
    return _for_pairs(name, rows, training)


def _for_pairs(name: str, rows: Tensor, training: Training) -> Tensor:
    """Embeddings in bf16 on a device whose pairwise kernels multiply in it.

    Nothing else: in bf16 a sum of token losses ends at 256, and a scale of 100 is off by .4.
    """
    return rows.to(training.dtype) if FIELDS[name].unit and reduction.on_device(rows) else rows


def _arithmetic(training: Training) -> AbstractContextManager:
    in_bf16 = training.dtype == torch.bfloat16
    return torch.autocast(training.engine.device.type, torch.bfloat16, enabled=in_bf16)


def attention(training: Training) -> AbstractContextManager:
    """On a CPU, the backward of torch's fused bf16 attention takes several times that of the plain
    one (torch 2.15, AMX).
    """
    plain = training.dtype == torch.bfloat16 and training.engine.device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
