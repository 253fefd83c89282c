"""Models beside the trained one that give the objective embeddings without gradient.

    ema    the model's moving average, w̄ ← d·w̄ + (1 − d)·w after every update: ema_image,
           ema_text, ema_negatives (decay d: DeGLA .9996, BriVL .99; Tarvainen & Valpola 2017)
    queue  the moving average's embeddings of the latest Q pairs of all ranks: queue_image,
           queue_text (MoCo, He et al. 2020); at the start zeros, which the terms leave out
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


def embeds(prefix: str) -> set[str]:
    """The embeddings that one of the three gives: unit rows under its prefix."""
    return {name for name, row in FIELDS.items() if name.startswith(prefix) and row.unit}


def supplies(options: config.Teacher) -> frozenset[str]:
    """The keywords of `vlp.losses` that such a teacher gives."""
    names: set[str] = set()
    if options.ema is not None:
        names |= embeds(EMA)
    if options.queue:
        names |= embeds(QUEUE)
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
            empty = torch.zeros(options.queue, model.embed_dim, device=engine.device)
            for name in ("queue_image", "queue_text"):
                self.queue[name] = saved.get(name, empty).to(engine.device, copy=True)
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

    def follow(self, embedded: Mapping[str, Tensor], step: int, counts: Tensor) -> None:
        """After update number `step`: move the average, and let the step's keys replace the queue's
        oldest; neither where the step does not count ([] bool, on the device). Collective.
        """
        for name, queue in self.queue.items():
            of_rank = embedded[name.replace(QUEUE, EMA)]
            keys = dist.all_gather(of_rank.to(queue.dtype), dist.world())

            # A ring: the step's number alone says where its keys go.
            number = step * len(keys) + torch.arange(len(keys), device=queue.device)
            places = number % len(queue)

            # A key with NaN would spoil every later step.
            enters = counts & keys.isfinite().all(1, keepdim=True)
            queue[places] = torch.where(enters, keys, queue[places])

        if self.average is not None and self.decay is not None:
            self.engine.follow(self.average, self.decay, counts)

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
