"""What stands beside the trained model and gives the objective embeddings without gradient.

    ema    the model's moving average, w̄ ← d·w̄ + (1 − d)·w after every update: ema_image, ema_text, ema_negatives
           (decay d: DeGLA .9996, BriVL .99; Tarvainen & Valpola 2017)
    queue  the moving average's embeddings of the latest Q pairs of all ranks: queue_image, queue_text (MoCo, He et al.
           2020); at the start zeros, which the terms leave out
    model  another, frozen model: teacher_image, teacher_text, teacher_scale

The average and the queue are part of the checkpoint. The average has float32 weights of its own,
sharded where the engine is FSDP2 and whole on every rank otherwise; the queue is whole on every
rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlp import checkpoint, config, dist
from vlp.data.text import same_tokens
from vlp.engines import Engine
from vlp.models.dual_encoder import DualEncoder, embed
from vlp.types import Batch

EMA, QUEUE, FROZEN = "ema_", "queue_", "teacher_"


def supplies(options: config.Teacher) -> frozenset[str]:
    """The keywords of `vlp.losses` that such a teacher gives."""
    average = {"ema_image", "ema_text", "ema_negatives"} if options.ema is not None else set()
    queue = {"queue_image", "queue_text"} if options.queue else set()
    frozen = (
        {"teacher_image", "teacher_text", "teacher_scale"} if options.model is not None else set()
    )
    return frozenset(average | queue | frozen)


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
        self.needs = needs | ({"ema_image", "ema_text"} if options.queue else set())
        weights = {
            name.removeprefix(EMA): value for name, value in saved.items() if name.startswith(EMA)
        }
        self.average = None if options.ema is None else engine.average(weights or None)
        self.frozen = (
            None if options.model is None else frozen(options.model, model).to(engine.device)
        )
        self.queue: dict[str, Tensor] = {}
        if options.queue:
            empty = torch.zeros(options.queue, model.embed_dim, device=engine.device)
            self.queue = {
                name: saved.get(name, empty).to(engine.device, copy=True)
                for name in ("queue_image", "queue_text")
            }
        if wrong := {len(kept) for kept in self.queue.values()} - {options.queue}:
            raise ValueError(
                f"the checkpoint's queue holds {wrong.pop()} pairs, not {options.queue}; set teacher.queue to that"
            )

    def embed(self, part: Batch) -> dict[str, Tensor]:
        """The needed embeddings of a micro-batch, [rows, …, D], with "teacher_scale" [] of a frozen
        model.
        """
        found = {}
        for prefix, model in ((EMA, self.average), (FROZEN, self.frozen)):
            wanted = {name.removeprefix(prefix) for name in self.needs if name.startswith(prefix)}
            if model is not None and wanted:
                found |= {
                    prefix + name: value
                    for name, value in embed(model, part, wanted).items()
                    if name in wanted
                }
        return found

    def follow(self, embedded: Mapping[str, Tensor], step: int) -> None:
        """After update number `step`: move the average, and let the step's keys replace the queue's
        oldest. Collective.
        """
        for name, kept in self.queue.items():
            keys = dist.all_gather(embedded[name.replace(QUEUE, EMA)].to(kept.dtype), dist.world())
            places = (step * len(keys) + torch.arange(len(keys), device=kept.device)) % len(kept)
            finite = keys.isfinite().all(
                1, keepdim=True
            )  # a key with NaN would spoil every later step
            kept[places] = torch.where(finite, keys, kept[places])
        if self.average is not None:
            self.engine.follow(self.average, self.decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: whole tensors on the first rank. Collective."""
        average = {} if self.average is None else self.engine.whole(self.average)
        return {EMA + name: value for name, value in average.items()} | (
            self.queue if dist.is_main() else {}
        )


def frozen(reference: str, student: DualEncoder, key: str = "teacher.model") -> DualEncoder:
    """The model behind `reference`, set at `key`; ValueError if it cannot read the student's pixels
    and tokens.
    """
    model = checkpoint.load_any(reference, like=student).requires_grad_(False).eval()
    own, wanted = ((m.image_spec.size, m.text_spec) for m in (model, student))
    if own[0] != wanted[0] or not same_tokens(own[1], wanted[1]):
        raise ValueError(
            f"{key} {reference} reads {own[0]} pixels and {own[1]}, but the model {wanted[0]} and {wanted[1]}: both get the "
            "same batch; take one that agrees, or store its embeddings with `vlp data embed` and name them in the source's "
            "`embeddings`"
        )
    return model
