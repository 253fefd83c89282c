"""From the `objective:` section of a configuration to one callable: total = Σ weight · term.

A loss file holds
    Options                          frozen dataclass of its configuration keys
    NEEDS, or needs(options)         frozenset of the keywords it reads (fields of `Inputs`)
    term(inputs, pairs, options)     this rank's share of the term: the mean over ranks is the term's value
    OPTIONAL                         optional: further keywords that it reads where the call carries them
    MIN_CANDIDATES = 2               optional: it compares a row with others
    MIN_VIEWS = 2                    optional: further views of an image that it needs
    initial_state(options)           optional: dict of tensors and `Table`s; `term` then takes `state` and returns
                                     (value, new state), a `Write` standing for a table
    for_run(options, samples, steps) optional: the options with what only the run knows
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.losses._table import Table, Write
from vlp.pairwise import Engine
from vlp.plugin import Plugin
from vlp.schema import did_you_mean

ALWAYS = frozenset({"image", "text", "scale"})
Moves = dict[str, dict[str, "Tensor | Write"]]  # label of a term: its new state


@dataclass(frozen=True)
class Schedule:
    """A weight that moves linearly from `start` to `end` over the first `steps` steps, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if min(self.start, self.end) < 0 or self.steps < 1:
            raise ValueError(f"a schedule needs start, end >= 0 and steps >= 1, found {self}")

    def at(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class Common:
    """Keys of every term."""

    weight: float | Schedule = 1.0  # factor of the term in the total, or {start, end, steps}

    def __post_init__(self) -> None:
        if isinstance(self.weight, float) and self.weight < 0:
            raise ValueError(f"weight: found {self.weight}, expected a number >= 0")

    def weight_at(self, step: int | None) -> float:
        return self.weight.at(step or 0) if isinstance(self.weight, Schedule) else self.weight


@dataclass(frozen=True)
class Inputs:
    """What terms may read: this rank's rows of one step. Embeddings are unit rows; nothing here normalises them."""

    image: Tensor  # [b, D]
    text: Tensor  # [b, D]
    scale: Tensor | float  # 1/temperature, already exponentiated
    bias: Tensor | float | None = None  # added to every score (sigmoid loss)
    step: int | None = None  # optimiser step: groups that alternate, schedules, states
    negatives: Tensor | None = None  # [b, K, D] hard captions
    negatives_valid: Tensor | None = None  # [b, K] bool
    negative_image: Tensor | None = None  # [b, D] an image that belongs to negatives[:, 0]
    counterfactual: Tensor | None = None  # [b, D] or [b, C, D]
    counterfactual_valid: Tensor | None = None  # [b] bool
    ema_image: Tensor | None = None  # this model's moving average: [b, D]
    ema_text: Tensor | None = None  # [b, D]
    ema_negatives: Tensor | None = None  # [b, K, D]
    teacher_image: Tensor | None = None  # another model: [b, D']
    teacher_text: Tensor | None = None  # [b, D']
    teacher_scale: Tensor | float | None = None
    sample_id: Tensor | None = None  # [b] int64
    score: Tensor | None = None  # [b] relevance of a pair, >= 0
    image_views: Tensor | None = None  # [V, b, D] further augmentations of the images, from a projection of their own
    text_views: Tensor | None = None  # [V, b, D]
    view_scale: Tensor | float | None = None  # 1/temperature of terms between views; None: scale
    queue_image: Tensor | None = None  # [Q, D] keys of earlier steps, equal on all ranks; rows of zeros: still empty
    queue_text: Tensor | None = None  # [Q, D]
    teacher_scores: Tensor | None = None  # [b, K] a teacher's score of each hard caption: higher fits the image better
    caption_logits: Tensor | None = None  # [b, L, V] at position l: for the token caption_ids[:, l]
    caption_ids: Tensor | None = None  # [b, L] int64
    caption_nll: Tensor | None = None  # [b, L] −log p of each token, instead of caption_logits, which are V times larger
    concept_logits: Tensor | None = None  # [b, C] of an auxiliary head on the image tower
    concept_targets: Tensor | None = None  # [b, C] >= 0, a teacher's weights of the concepts; a row of zeros has none

    def wide(self) -> Inputs:
        """The same with half-precision tensors as float32: for scores that a term computes itself. At a scale of 100
        a product rounded to bfloat16 is off by a quarter. (The reductions of `vlp.pairwise` accumulate in float32.)
        Not caption_logits, by far the largest: their term widens them itself."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "caption_logits"}
        half = (torch.bfloat16, torch.float16)
        return replace(self, **{n: v.float() for n, v in values.items() if isinstance(v, Tensor) and v.dtype in half})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tuple(v.shape) for name, v in values.items() if isinstance(v, Tensor) and v.dim()}


INSTEAD = {"caption_logits": "caption_nll"}  # keywords that another one can stand for
KEYWORDS = tuple(f.name for f in fields(Inputs))
NOT_BY_ROW = {"scale", "bias", "step", "view_scale", "teacher_scale", "queue_image", "queue_text"}
VIEWS = {"image_views", "text_views"}  # rows are their second dimension

_EMA = "a moving average of the model (teacher.ema; DeGLA .9996, BriVL .99)"
_QUEUE = "a queue of the moving average's embeddings (teacher.queue and teacher.ema)"
_TEACHER = "a teacher model (teacher.model) or its stored embeddings (vlp data embed, and the source's `embeddings`)"
# Keywords that not every model and data set has, and what supplies them: in `vlp train`, what is in parentheses.
SUPPLIERS = {
    "bias": "a model with a logit bias (model.bias; SigLIP -10)",
    "negatives": "shards with hard captions (vlp data negatives)",
    "negative_image": "shards with an image of a hard caption (vlp data negatives --from FILE.jsonl)",
    "counterfactual": "shards with counterfactual captions (vlp data counting)",
    "score": "shards with a relevance of each pair (the JSON's `score`)",
    "sample_id": "the loader: a stable number of each sample",
    "ema_image": _EMA,
    "ema_text": _EMA,
    "ema_negatives": _EMA,
    "queue_image": _QUEUE,
    "queue_text": _QUEUE,
    "teacher_image": _TEACHER,
    "teacher_text": _TEACHER,
    "teacher_scale": _TEACHER,
    "teacher_scores": "a teacher's scores of the hard captions (the JSON's `negative_scores`)",
    "image_views": "further augmentations of each image (data.views and model.heads.views)",
    "text_views": "further augmentations of each caption (data.views and model.heads.views)",
    "caption_logits": "a text decoder (model.heads.captions)",
    "caption_ids": "a text decoder (model.heads.captions)",
    "concept_logits": "an auxiliary head on the image tower (model.heads.concepts)",
    "concept_targets": "a teacher's concepts of each image (the JSON's `concepts`)",
}


class Objective:
    """Called with keywords (see `Inputs`), returns `(total, terms)`.

    total: 0-d tensor, Σ weight·term; terms: {label: detached, unweighted 0-d tensor}. Both are this rank's share: the
    MEAN over ranks is the value, and the mean over ranks of gradients is the gradient, of the single-process term.
    Keywords that no term needs are ignored. Raises ValueError for an unknown keyword, for a needed one that is
    missing, and for rows that differ between ranks (checked at the first call) or change later.
    State (margins, numbers of each sample, …) moves only when `step` is given and gradients are enabled.
    """

    def __init__(self, plugins: list[Plugin], engine: Engine) -> None:
        self.plugins, self.engine = plugins, engine
        self.required = {p.label: _needs(p) for p in plugins}
        self.needs = frozenset().union(*self.required.values()) - ALWAYS
        self.reads = self.needs.union(ALWAYS, {"step"}, *(getattr(p.module, "OPTIONAL", ()) for p in plugins))
        stateful = {p.label: p for p in plugins if hasattr(p.module, "initial_state")}
        self.state = {label: p.module.initial_state(p.options) for label, p in stateful.items()}
        for table in (s for state in self.state.values() for s in state.values() if isinstance(s, Table)):
            table.place(engine.ranks)  # now, not at the first step: memory that is not there should be missed at once
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def candidates(self, n_rows: int) -> int:
        """n = g·b: how many columns a row of this rank is compared with. Uninformative scores give log n."""
        return self.engine.group_size * n_rows

    def __call__(self, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms, moves = self.evaluate(**keywords)
        self.commit(moves)
        return total, terms

    def evaluate(self, **keywords: Any) -> tuple[Tensor, dict[str, Tensor], Moves]:
        """As a call, but the state stays; `commit` makes the moves returned, once the step is known to count."""
        inputs = self._inputs(keywords)
        pairs = self.engine.at(inputs.step)
        dtype = torch.float64 if inputs.image.dtype == torch.float64 else torch.float32
        total, terms, moves = inputs.image.new_zeros((), dtype=dtype), {}, {}
        for plugin in self.plugins:
            value, move = self._term(plugin, inputs, pairs)
            if move and inputs.step is not None and torch.is_grad_enabled():
                moves[plugin.label] = move
            value = value.to(dtype)
            terms[plugin.label] = value.detach()
            total = total + plugin.common.weight_at(inputs.step) * value
        return total, terms, moves

    def commit(self, moves: Moves) -> None:
        """Move the state as an evaluation found. Collective where it holds numbers of each sample."""
        for label, move in moves.items():
            self.state[label] = {n: s.apply() if isinstance(s, Write) else s.detach() for n, s in move.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{label: {name: tensor}}. Numbers of each sample are whole, [samples, c], on the first rank and empty on the
        others. Collective."""
        return {
            label: {name: s.whole() if isinstance(s, Table) else s.clone() for name, s in state.items()}
            for label, state in self.state.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take what the first rank of any number of ranks saved; every rank brings the whole. Collective."""
        if state.keys() != self.state.keys():
            raise ValueError(
                f"found objective state of {sorted(state)}, but this objective keeps {sorted(self.state)}; resume with the "
                "objective of the checkpoint, or start anew from its weights with init_from"
            )
        for label, tensors in state.items():
            own = self.state[label]
            if tensors.keys() != own.keys():
                raise ValueError(f"state of {label!r} holds {sorted(tensors)}, expected {sorted(own)}")
            for name, tensor in tensors.items():
                if isinstance(own[name], Table):
                    own[name].load(tensor)
                else:
                    own[name] = tensor.clone()

    def _term(self, plugin: Plugin, inputs: Inputs, pairs: Any) -> tuple[Tensor, dict[str, Tensor | Write]]:
        own = [self.state[plugin.label]] if plugin.label in self.state else []
        try:
            found = plugin.module.term(inputs, pairs, plugin.options, *own)
        except ValueError as error:
            raise ValueError(f"the term {plugin.label!r}: {error}") from error
        return found if own else (found, {})

    def _inputs(self, keywords: dict[str, Any]) -> Inputs:
        unknown = [f"unknown keyword {k!r}{did_you_mean(k, KEYWORDS)}" for k in keywords if k not in KEYWORDS]
        missing = [
            f"the term {label!r} needs {name!r}, which the call does not carry{_from(name)}: give {name}=… or drop the term"
            for label, needs in self.required.items()
            for name in sorted(needs | ALWAYS)
            if keywords.get(name) is None and keywords.get(INSTEAD.get(name, name)) is None
        ]
        if unknown or missing:
            raise ValueError("; ".join(unknown + missing))
        inputs = Inputs(**{k: v for k, v in keywords.items() if k in self.reads})
        self._check(inputs)
        return inputs

    def _check(self, inputs: Inputs) -> None:
        """Shapes, once: an exchange between ranks at the first call, a comparison with it afterwards."""
        shapes = inputs.shapes()
        if self._shapes is None:
            self._check_first(shapes)
            self._shapes = shapes
        elif self.engine.ranks.size > 1 and shapes != self._shapes:
            changed = {name: (self._shapes.get(name), s) for name, s in shapes.items() if s != self._shapes.get(name)}
            raise ValueError(
                f"shapes changed since the first step, {changed}: ranks would no longer match; "
                "give every step the same rows on every rank, or build another objective"
            )
        elif shapes["image"] != shapes["text"]:
            raise ValueError(f"image {shapes['image']} and text {shapes['text']} must have one shape [b, D]")

    def _check_first(self, shapes: dict[str, tuple[int, ...]]) -> None:
        every = dist.gather_objects(shapes, self.engine.ranks)
        for name in sorted(set().union(*every)):
            if len({ranks.get(name) for ranks in every}) > 1:
                sizes = {f"rank {r}": s.get(name) for r, s in zip(self.engine.ranks.ranks, every)}
                raise ValueError(f"{name} differs between ranks, {sizes}: every rank must bring the same number of rows")
        if len(shapes["image"]) != 2 or shapes["image"] != shapes["text"]:
            raise ValueError(f"image {shapes['image']} and text {shapes['text']} must have one shape [b, D]")
        b = shapes["image"][0]
        wrong = {name: s for name, s in shapes.items() if name not in NOT_BY_ROW and b not in s[int(name in VIEWS) :][:1]}
        if wrong:
            raise ValueError(f"image has {b} rows, but found {wrong}: give every tensor the same rows, [b, …] or [V, b, D]")
        n = self.candidates(shapes["image"][0])
        for plugin in self.plugins:
            least = getattr(plugin.module, "MIN_CANDIDATES", 1)
            if n < least:
                raise ValueError(f"the term {plugin.label!r} needs at least {least} candidates a row, found {n}: raise "
                                 "the batch size or the group size")  # fmt: skip


def _needs(plugin: Plugin) -> frozenset[str]:
    module = plugin.module
    return frozenset(module.needs(plugin.options) if hasattr(module, "needs") else module.NEEDS)


def supplier(name: str) -> str:
    """What a keyword comes from, in words; empty for those that every call has."""
    return SUPPLIERS.get(name.removesuffix("_valid"), "")


def _from(name: str) -> str:
    return f" (it comes from {supplier(name)})" if supplier(name) else ""
