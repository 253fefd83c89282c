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

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.fields import supplier
from vlp.losses._boundary import evaluated
from vlp.losses._inputs import KEYWORDS, Inputs
from vlp.losses._table import Table, Write
from vlp.pairwise import Engine, Pairs
from vlp.plugin import Plugin
from vlp.schema import did_you_mean

ALWAYS = frozenset({"image", "text", "scale"})
Moves = dict[str, dict[str, "Tensor | Write"]]  # label of a term: its new state


@dataclass(frozen=True)
class Schedule:
    """A weight that moves linearly from `start` to `end` over the first `steps` steps, and stays
    there.
    """

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


INSTEAD = {"caption_nll": "caption_logits"}  # keywords that another one can stand for


class Objective:
    """Called with keywords (see `Inputs`), returns `(total, terms)`.

    total: 0-d tensor, Σ weight·term; terms: {label: detached, unweighted 0-d tensor}. Both are this
    rank's share: the MEAN over ranks is the value, and the mean over ranks of gradients is the
    gradient, of the single-process term. Keywords that no term needs are ignored. Autocast has no
    influence, on the backward pass neither; gradients cannot be differentiated again
    (NotImplementedError).

    Raises ValueError for an unknown keyword, for a needed one that is missing, for shapes and
    dtypes that are not those of `Inputs`, for shapes that differ between ranks or change later on
    several ranks, and for rows that are not unit, within 1 % (`normalize` makes them so). Norms are
    measured at the first call, where ranks agree on what they found, and after it only where that
    is free: on the CPU of a single process. State (margins, numbers of each sample, …) moves only
    when `step` is given and gradients are enabled, and never by what is not finite.
    """

    def __init__(self, plugins: list[Plugin], engine: Engine, normalize: bool = False) -> None:
        self.plugins, self.engine, self.normalize = plugins, engine, normalize
        self.required = {p.label: _needs(p) for p in plugins}
        self.needs = frozenset().union(*self.required.values()) - ALWAYS
        self.reads = reads(plugins).union(ALWAYS, {"step"})
        stateful = {p.label: p for p in plugins if hasattr(p.module, "initial_state")}
        self.state = {label: p.module.initial_state(p.options) for label, p in stateful.items()}
        for table in (
            s for state in self.state.values() for s in state.values() if isinstance(s, Table)
        ):
            table.place(
                engine.ranks
            )  # now, not at the first step: memory that is not there should be missed at once
        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the first call

    def candidates(self, n_rows: int) -> int:
        """n = g·b: how many columns a row of this rank is compared with. Uninformative scores give
        log n.
        """
        return self.engine.group_size * n_rows

    def __call__(self, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms, moves = self.evaluate(**keywords)
        self.commit(moves)
        return total, terms

    def evaluate(self, **keywords: Any) -> tuple[Tensor, dict[str, Tensor], Moves]:
        """As a call, but the state stays; `commit` makes the moves returned, once the step is known
        to count.
        """
        inputs = self._inputs(keywords)
        self._check(inputs)
        return evaluated(partial(self._evaluate, self.engine.at(inputs.step)), inputs)

    def _evaluate(self, pairs: Pairs, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor], Moves]:
        inputs = inputs.prepared(self.normalize)
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
            self.state[label] = {
                n: s.apply() if isinstance(s, Write) else s.detach() for n, s in move.items()
            }

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{label: {name: tensor}}. Numbers of each sample are whole, [samples, c], on the first
        rank and empty on the others. Collective.
        """
        return {
            label: {
                name: s.whole() if isinstance(s, Table) else s.clone() for name, s in state.items()
            }
            for label, state in self.state.items()
        }

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Take what the first rank of any number of ranks saved; every rank brings the whole.
        Collective.
        """
        if state.keys() != self.state.keys():
            raise ValueError(
                f"found objective state of {sorted(state)}, but this objective keeps {sorted(self.state)}; resume with the "
                "objective of the checkpoint, or start anew from its weights with init_from"
            )
        for label, tensors in state.items():
            own = self.state[label]
            if tensors.keys() != own.keys():
                raise ValueError(
                    f"state of {label!r} holds {sorted(tensors)}, expected {sorted(own)}"
                )
            for name, tensor in tensors.items():
                if isinstance(own[name], Table):
                    own[name].load(tensor)
                else:
                    own[name] = tensor.clone()

    def _term(
        self, plugin: Plugin, inputs: Inputs, pairs: Any
    ) -> tuple[Tensor, dict[str, Tensor | Write]]:
        own = [self.state[plugin.label]] if plugin.label in self.state else []
        try:
            found = plugin.module.term(inputs, pairs, plugin.options, *own)
        except ValueError as error:
            raise ValueError(f"the term {plugin.label!r}: {error}") from error
        return found if own else (found, {})

    def _inputs(self, keywords: dict[str, Any]) -> Inputs:
        unknown = [
            f"unknown keyword {k!r}{did_you_mean(k, KEYWORDS)}"
            for k in keywords
            if k not in KEYWORDS
        ]
        missing = [
            f"the term {label!r} needs {name!r}, which the call does not carry{_from(name)}: give {name}=… or drop the term"
            for label, needs in self.required.items()
            for name in sorted(needs | ALWAYS)
            if keywords.get(name) is None and keywords.get(INSTEAD.get(name, name)) is None
        ]
        if unknown or missing:
            raise ValueError("; ".join(unknown + missing))
        return Inputs(**{k: v for k, v in keywords.items() if k in self.reads})

    def _check(self, inputs: Inputs) -> None:
        """Everything that can be refused before a term runs. The first call exchanges it between
        ranks, later ones do not.
        """
        first, alone = self._shapes is None, self.engine.ranks.size == 1
        problems = inputs.problems()
        if not problems and (first or (alone and inputs.image.device.type == "cpu")):
            problems = inputs.unit_problems(self.normalize)
        shapes = inputs.shapes() if not problems else {}
        if first:
            problems = self._agreed(problems, shapes)
        elif not alone and not problems and shapes != self._shapes:
            changed = {
                name: (self._shapes.get(name), s)
                for name, s in shapes.items()
                if s != self._shapes.get(name)
            }
            problems = [
                f"shapes changed since the first step, {changed}: ranks would no longer match; "
                "give every step the same rows on every rank, or build another objective"
            ]
        if problems:
            raise ValueError("\n".join(problems))
        self._check_candidates(len(inputs.image))
        self._shapes = self._shapes or shapes

    def _agreed(self, problems: list[str], shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """The problems of all ranks, or those between them: every rank raises what one rank found."""
        every = dist.gather_objects((problems, shapes), self.engine.ranks)
        if found := [problem for problems, _ in every for problem in problems]:
            return list(dict.fromkeys(found))
        different = []
        for name in sorted(set().union(*(shapes for _, shapes in every))):
            sizes = {f"rank {r}": s.get(name) for r, (_, s) in zip(self.engine.ranks.ranks, every)}
            if len(set(sizes.values())) > 1:
                different.append(
                    f"{name} differs between ranks, {sizes}: every rank must bring the same number of rows"
                )
        return different

    def _check_candidates(self, n_rows: int) -> None:
        n = self.candidates(n_rows)
        for plugin in self.plugins:
            least = getattr(plugin.module, "MIN_CANDIDATES", 1)
            if n < least:
                raise ValueError(
                    f"the term {plugin.label!r} needs at least {least} candidates a row, found {n}: raise "
                    "the batch size or the group size"
                )


def reads(plugins: Iterable[Plugin]) -> frozenset[str]:
    """The keywords that some of the terms read, needed or not."""
    return frozenset().union(*(_needs(p).union(getattr(p.module, "OPTIONAL", ())) for p in plugins))


def _needs(plugin: Plugin) -> frozenset[str]:
    module = plugin.module
    return frozenset(module.needs(plugin.options) if hasattr(module, "needs") else module.NEEDS)


def _from(name: str) -> str:
    return f" (it comes from {supplier(name)})" if supplier(name) else ""
