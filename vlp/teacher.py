"""Models beside the trained one that give the objective embeddings without gradient.

    ema    the model's moving average, w̄ ← d·w̄ + (1 − d)·w after every update: ema_image,
           ema_text, ema_negatives (decay d: DeGLA .9996, BriVL .99; Tarvainen & Valpola 2017)
    queue  the moving average's embeddings of the latest Q pairs of all ranks: queue_image,
           queue_text (MoCo, He et al. 2020); at the start zeros, which the terms leave out;
           queue_label, the pairs' labels, where a term reads it
    model  another, frozen model: teacher_image, teacher_text, teacher_scale

Which fields each of them embeds stands in `vlp.fields`, under its prefix. The average and the queue
are part of the checkpoint. The average has float32 weights of its own, sharded where the engine is
FSDP2 and whole on every rank otherwise; the queue is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlp import checkpoint, config, dist
from vlp.data.text import same_tokens
from vlp.engines import Engine
from vlp.fields import FIELDS
from vlp.models.dual_encoder import DualEncoder
from vlp.models.embedding import embed
from vlp.models.stages import Stages
from vlp.types import Batch

EMA, QUEUE, FROZEN = "ema_", "queue_", "teacher_"  # prefixes of what each gives
# What enters the queue, by its name there.
ENTERS = {"queue_image": "ema_image", "queue_text": "ema_text", "queue_label": "label"}


def embeds(prefix: str) -> set[str]:
    """The embeddings that one of the three gives: unit rows under its prefix."""
    return {name for name, row in FIELDS.items() if name.startswith(prefix) and row.unit}


def supplies(options: config.Teacher) -> frozenset[str]:
    """The keywords of `vlp.losses` that such a teacher gives."""
    names: set[str] = set()
    if options.ema is not None:
        names |= embeds(EMA)
    if options.queue:
        names |= ENTERS.keys()
    if options.model is not None:
        names |= embeds(FROZEN) | {"teacher_scale"}
    return frozenset(names)


class Teacher:
    """The teacher of a run, once the engine holds the model. `saved`: the result of `state` to
    continue from.
    """

    def __init__(
        self,
        options: config.Teacher,
        engine: Engine,
        model: DualEncoder,
        needs: frozenset[str],
        saved: Mapping[str, Tensor],
    ) -> None:
        self.decay, self.engine = options.ema, engine
        self.evaluates_average = options.eval_ema

        # What follows the prefixes among the needs; the queue takes the average's embeddings.
        self.needs = needs | ({"ema_image", "ema_text"} if options.queue else set())

        self.average = None
        if options.ema is not None:
            self.average = engine.average(_without_prefix(saved, EMA) or None)
        self.frozen = None
        if options.model is not None:
            self.frozen = frozen(options.model, model).to(engine.device)

        self.queue: dict[str, Tensor] = {}
        if options.queue:
            keys = torch.zeros(options.queue, model.embed_dim)
            empty = {"queue_image": keys, "queue_text": keys}
            if "queue_label" in needs:
                empty["queue_label"] = torch.zeros(options.queue, dtype=torch.int64)
            for name, rows in empty.items():
                self.queue[name] = saved.get(name, rows).to(engine.device, copy=True)
        # Keys of another queue's length have no places in this one.
        if wrong := {len(keys) for keys in self.queue.values()} - {options.queue}:
            raise ValueError(
                f"the checkpoint's queue holds {wrong.pop()} pairs, not {options.queue}; set "
                "teacher.queue to that"
            )

    def embed(self, part: Batch) -> dict[str, Tensor]:
        """The needed embeddings of a micro-batch, [rows, …, D], with "teacher_scale" [] of a frozen
        model.
        """
        embedded = {}
        for prefix, model in ((EMA, self.average), (FROZEN, self.frozen)):
            wanted = {name.removeprefix(prefix) for name in self.needs if name.startswith(prefix)}
            if model is None or not wanted:
                continue

            for name, value in embed(model, part, wanted).items():
                if name in wanted:
                    embedded[prefix + name] = value
        return embedded

    def follow(self, rows: Mapping[str, Tensor], step: int, counts: Tensor) -> None:
        """After update number `step`: move the average, and let this rank's rows of the step, by
        the names of ENTERS, replace the queue's oldest; neither where the step does not count
        ([] bool, on the device). Collective.
        """
        if self.queue:
            self._enter(rows, step, counts)
        if self.average is not None and self.decay is not None:
            self.engine.follow(self.average, self.decay, counts)

    def _enter(self, rows: Mapping[str, Tensor], step: int, counts: Tensor) -> None:
        """Let the keys of all ranks' pairs take the places of the oldest."""
        keys = {
            name: dist.all_gather(rows[ENTERS[name]].to(queue.dtype), dist.world())
            for name, queue in self.queue.items()
        }

        # A key with NaN would spoil every later step; its pair stays out as a whole.
        finite = [key.isfinite().view(len(key), -1).all(1) for key in keys.values()]
        enters = counts & torch.stack(finite).all(0)

        # A ring: the step's number alone says where its keys go.
        number = step * len(enters) + torch.arange(len(enters), device=enters.device)
        for name, queue in self.queue.items():
            places = number % len(queue)
            which = enters.view(-1, *(1,) * (queue.ndim - 1))
            queue[places] = torch.where(which, keys[name], queue[places])

    def evaluation_model(self) -> DualEncoder | None:
        """A plain model with the moving average's weights, where `teacher.eval_ema` asks for its
        scores. Collective.
        """
        if not self.evaluates_average:
            return None
        return self.engine.evaluation_model(self.average)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: whole tensors on the first rank. Collective."""
        average = {} if self.average is None else self.engine.whole(self.average)
        # Whole on every rank; one of them saves it.
        queue = self.queue if dist.is_main() else {}
        return {EMA + name: value for name, value in average.items()} | queue


def frozen(
    reference: str, student: DualEncoder, key: str = "teacher.model"
) -> DualEncoder | Stages:
    """The model behind `reference`, set at `key`; ValueError if it cannot read the student's pixels
    and tokens.
    """
    model = checkpoint.load_any(reference, like=student).requires_grad_(False).eval()

    # Both get the same batch, so both must have been made for the same pixels and tokens.
    size, tokens = model.image_spec.size, model.text_spec
    expected_size, expected_tokens = student.image_spec.size, student.text_spec
    if size != expected_size or not same_tokens(tokens, expected_tokens):
        raise ValueError(
            f"{key} {reference} reads {size} pixels and {tokens}, but the model {expected_size} "
            f"and {expected_tokens}: both get the same batch; take one that agrees, or store its "
            "embeddings with `vlp data embed` and name them in the source's `embeddings`"
        )
    return model


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
