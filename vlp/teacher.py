"""Models beside the trained one that give the objective embeddings without gradient.

    ema    the model's moving average, w̄ ← d·w̄ + (1 − d)·w after every update: ema_image,
           ema_text, ema_negatives (decay d: DeGLA .9996, BriVL .99; Tarvainen & Valpola 2017)
    queue  the moving average's embeddings of the latest Q pairs of all ranks: queue_image,
           queue_text (MoCo, He et al. 2020); at the start zeros, which the terms leave out;
           queue_label, the pairs' labels, where a term reads it
           and the teachers' rows, where a term reads them: queue_teacher_image,
           queue_teacher_text; and pictures and captions, where a cross-encoder judges keys
    model  other, frozen models: teacher_image, teacher_text, teacher_scale

Which fields each of them embeds stands in `vlp.fields`, under its prefix. The average and the queue
are part of the checkpoint. The average has float32 weights of its own, sharded where the engine is
FSDP2 and whole on every rank otherwise; the queue is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlp import checkpoint, config, dist, log
from vlp.data.raw_texts import CAPTION_BYTES
from vlp.data.text import same_tokens
from vlp.engines import Engine
from vlp.engines.base import Named, gathered
from vlp.fields import FIELDS
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.models.embedding import embed
from vlp.pretrained.parts import dtype_of, shape_of
from vlp.types import Batch

EMA, QUEUE, FROZEN = "ema_", "queue_", "teacher_"  # prefixes of what each gives
# What enters the queue, by its name there: of the moving average, with the pair's label, and of
# the teachers.
OF_AVERAGE = {"queue_image": "ema_image", "queue_text": "ema_text", "queue_label": "label"}
OF_TEACHERS = {"queue_teacher_image": "teacher_image", "queue_teacher_text": "teacher_text"}
# Pictures and captions of the moving average's keys, which a judge reads (vlp.online_judge).
OF_JUDGE = {"queue_pixels": "pixels", "queue_caption_bytes": "caption_bytes"}
ENTERS = OF_AVERAGE | OF_TEACHERS | OF_JUDGE


def embeds(prefix: str) -> set[str]:
    """The embeddings that one of the three gives: unit rows under its prefix."""
    return {name for name, row in FIELDS.items() if name.startswith(prefix) and row.unit}


def supplies(options: config.Teacher) -> frozenset[str]:
    """The keywords of `vlp.losses` that such a teacher gives."""
    names: set[str] = set()
    if options.ema is not None:
        names |= embeds(EMA)
    if options.queue:
        names |= OF_TEACHERS.keys()
    if options.queue and options.ema is not None:
        names |= OF_AVERAGE.keys()
    if options.models:
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
        stored_shape: tuple[int, ...] = (),
    ) -> None:
        """`stored_shape`: of one row of the data's teacher_image, where the data carry it."""
        self.decay, self.engine = options.ema, engine
        self.evaluates_average = options.eval_ema

        # What follows the prefixes among the needs; the queue takes the average's embeddings.
        queues_average = options.queue and options.ema is not None
        through_queue = {"ema_image", "ema_text"} if queues_average else set()
        self.needs = needs | through_queue

        self.average = None
        if options.ema is not None:
            self.average = engine.average(_OfAverage(saved) or None)
        self.frozen = [frozen(name, model).to(engine.device) for name in options.models]

        of_teachers = stored_shape
        if self.frozen:
            widths = [teacher.embed_dim for teacher in self.frozen]
            check_map(model, widths)
            of_teachers = _row_shape(widths)
        self.queue: dict[str, Tensor] = {}
        empty = _empty_queue(options, model.embed_dim, of_teachers, needs)
        empty |= _empty_pictures(options.queue, model.image_spec.size, needs)
        held = _held_queue(saved, empty.keys())
        for name, rows in empty.items():
            self.queue[name] = held.get(name, rows).to(engine.device, copy=True)
        # Keys of another queue's length have no places in this one.
        if wrong := {len(keys) for keys in self.queue.values()} - {options.queue}:
            raise ValueError(
                f"the checkpoint's queue holds {wrong.pop()} pairs, not {options.queue}; set "
                "teacher.queue to that"
            )

    def embed(self, part: Batch) -> dict[str, Tensor]:
        """The needed embeddings of a micro-batch, [rows, …, D], with "teacher_scale" of frozen
        models: of one [], of several [T], whose rows are [rows, T, D'].
        """
        embedded: dict[str, Tensor] = {}
        if self.average is not None:
            embedded |= self._embedded_by([self.average], EMA, part)
        if self.frozen:
            embedded |= self._embedded_by(self.frozen, FROZEN, part)
        return embedded

    def _embedded_by(
        self, models: Sequence[nn.Module], prefix: str, part: Batch
    ) -> dict[str, Tensor]:
        wanted = {name.removeprefix(prefix) for name in self.needs if name.startswith(prefix)}
        if not wanted:
            return {}

        by_model = [embed(model, part, wanted) for model in models]
        return {
            prefix + name: beside([values[name] for values in by_model])
            for name in by_model[0]
            if name in wanted
        }

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

    def tensors(self) -> Named:
        """What a checkpoint holds: name and tensor, whole on every rank or a DTensor."""
        if self.average is not None:
            for name, value in self.average.state_dict().items():
                yield EMA + name, value
        yield from self.queue.items()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: whole tensors on the CPU of the first rank. Collective."""
        return gathered(self.tensors(), keep=dist.is_main())


def check_map(model: DualEncoder, widths: list[int]) -> None:
    """Refuse a head that maps to other widths than those of the teachers."""
    head = model.heads.teacher
    if head is None or list(head.widths) == widths:
        return
    written = widths[0] if len(widths) == 1 else widths
    raise ValueError(
        f"model.heads.teacher.width is {head.options.width}, but the teachers' embeddings"
        f" are {written} wide; set it to {written}"
    )


def beside(of_teachers: Sequence[Tensor]) -> Tensor:
    """Rows [b, D'], or numbers [], of several teachers as [b, T, D'] or [T], those of narrower
    teachers filled up with zeros; of one alone as they are.
    """
    if len(of_teachers) == 1:
        return of_teachers[0]
    if not of_teachers[0].dim():
        return torch.stack(list(of_teachers))

    width = max(rows.shape[-1] for rows in of_teachers)
    padded = [functional.pad(rows, (0, width - rows.shape[-1])) for rows in of_teachers]
    return torch.stack(padded, 1)


def _row_shape(widths: list[int]) -> tuple[int, ...]:
    """The shape of one row of `beside`."""
    return (widths[0],) if len(widths) == 1 else (len(widths), max(widths))


def _empty_queue(
    options: config.Teacher, width: int, of_teachers: tuple[int, ...], needs: frozenset[str]
) -> dict[str, Tensor]:
    """What the queue holds at the start, by name."""
    if not options.queue:
        return {}

    empty: dict[str, Tensor] = {}
    if options.ema is not None:
        empty |= {name: torch.zeros(options.queue, width) for name in ("queue_image", "queue_text")}
    if "queue_label" in needs:
        empty["queue_label"] = torch.zeros(options.queue, dtype=torch.int64)
    for name in needs & OF_TEACHERS.keys():
        empty[name] = torch.zeros(options.queue, *of_teachers)
    return empty


def _held_queue(saved: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """A checkpoint's queue; nothing where it lacks a part, with which keys would stand beside the
    zeros of an empty place.
    """
    held = {name: saved[name] for name in saved if name in names}
    missing = sorted(set(names) - held.keys())
    if not held or not missing:
        return held
    if dist.is_main():
        log.warn(
            f"the checkpoint's queue holds no {', '.join(missing)}, which is read now; it starts "
            "empty"
        )
    return {}


def _empty_pictures(n_keys: int, size: tuple[int, int], needs: frozenset[str]) -> dict[str, Tensor]:
    """What the queue holds at the start for a judge, by name."""
    row_shapes = {"queue_pixels": (3, *size), "queue_caption_bytes": (CAPTION_BYTES,)}
    return {
        name: torch.zeros(n_keys, *shape, dtype=torch.uint8)
        for name, shape in row_shapes.items()
        if name in needs
    }


def frozen(
    reference: str, student: DualEncoder, key: str = "teacher.model"
) -> DualEncoder | Concatenated:
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


class _OfAverage(Mapping[str, Tensor]):
    """A checkpoint's moving average by the model's names, of which each is read when it is asked
    for.
    """

    def __init__(self, saved: Mapping[str, Tensor]) -> None:
        self.saved = saved
        self._names = [name.removeprefix(EMA) for name in saved if name.startswith(EMA)]

    def __getitem__(self, name: str) -> Tensor:
        return self.saved[EMA + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return shape_of(self.saved, EMA + name)

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self.saved, EMA + name)
