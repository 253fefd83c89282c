"""From the `objective:` section of a configuration to one callable: total = Σ weight · term.

A loss file holds
    Options                          frozen dataclass of its configuration keys
    NEEDS, or needs(options)         frozenset of the keywords it reads (fields of `Inputs`)
    term(inputs, pairs, options)     this rank's share of the term: the mean over ranks is its value

and may hold
    OPTIONAL, or optional(options)   further keywords that it reads where the call carries them
    MIN_CANDIDATES = 2               it compares a row with others
    MIN_VIEWS = 2, or min_views(options)    further views of an image that it needs
    initial_state(options)           dict of tensors and `Table`s; `term` then takes `state` and
                                     returns (value, new state), a `Write` standing for a table
    for_run(options, samples, steps) the options with what only the run knows
    asks(options)                    the candidates of a batch that a cross-encoder has to judge
    exported_scale(options)          its 1/temperature, where it is not the model's learned scale
    label(options)                   its name in logs, where that is not the file's
    wrapped(options)                 the terms inside it that it evaluates itself
    check_width(options, width)      raises ValueError where it does not fit embeddings of that D
    check_modalities(options, names, width, n)    the same of a run's modalities, D and candidates
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlp import dist
from vlp.fields import supplier
from vlp.losses._boundary import evaluated
from vlp.losses._candidate_options import Candidates
from vlp.losses._inputs import KEYWORDS, Inputs
from vlp.losses._table import Table, Write
from vlp.losses._terms import keeps_state, leaves, needs, reads, state_of, value_of
from vlp.pairwise import Backend, Pairs, reduction
from vlp.pairwise.arriving import Arriving
from vlp.plugin import Plugin
from vlp.schema import did_you_mean

ALWAYS = frozenset({"image", "text", "scale"})
NewStates = dict[str, dict[str, "Tensor | Write"]]  # label of a term: its new state

INSTEAD = {"caption_nll": "caption_logits"}  # keywords that another one can stand for


class Objective:
    """Called with keywords (see `Inputs`), returns `(total, terms)`.

    total: 0-d tensor, Σ weight·term; terms: {label: detached, unweighted 0-d tensor}, and as
    `label.name` what a term notes beside its value (infonce.ignored, say). All are this rank's
    share: the MEAN over ranks is the value, and the mean over ranks of gradients is the gradient,
    of the single-process term. Keywords that no term needs are ignored. Autocast has no influence,
    on the backward pass neither; gradients cannot be differentiated again (NotImplementedError).

    Raises ValueError for an unknown keyword, for a needed one that is missing, for shapes and
    dtypes that are not those of `Inputs`, for shapes that differ between ranks or change later on
    several ranks, and for rows that are not unit, within 1 % (`normalize` makes them so). Norms are
    measured at the first call, where ranks agree on what they found, and after it only where that
    is free: on the CPU of a single process. State (margins, numbers of each sample, …) moves only
    when `step` is given and gradients are enabled, and never by what is not finite.
    """

    def __init__(self, plugins: list[Plugin], backend: Backend, normalize: bool = False) -> None:
        self.plugins, self.backend, self.normalize = plugins, backend, normalize

        # What each term needs is known before the first call, and refused by name in it.
        self.required = {plugin.label: needs(plugin) for plugin in plugins}
        self.needs = frozenset().union(*self.required.values()) - ALWAYS
        self.reads = reads(plugins).union(ALWAYS, {"step"})

        self.state = {plugin.label: state_of(plugin) for plugin in plugins if keeps_state(plugin)}
        # Tables take their memory now: what is not there should be missed at once, not at the first
        # step.
        for state in self.state.values():
            for value in state.values():
                if isinstance(value, Table):
                    value.place(backend.ranks)

        self._shapes: dict[str, tuple[int, ...]] | None = None  # of the first call
        # Whether the last step's terms gathered the texts, which no plugin declares.
        self._gathers_texts = False

    def candidates(self, n_rows: int) -> int:
        """n = g·b: how many columns a row of this rank is compared with.

        Uninformative scores give log n.
        """
        return self.backend.group_size * n_rows

    def gathers_texts_in(self, step: int) -> dist.Group | None:
        """The ranks that will gather this rank's texts, as they are, at this step, by what the step
        before it did, alike on all ranks; None: nobody, as far as is known. Whoever has the texts
        early may begin.
        """
        as_they_are = self._gathers_texts and not self.normalize
        return self.backend.group_of_texts(step) if as_they_are else None

    # A call

    def __call__(self, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
        total, terms, new_states = self.evaluate(**keywords)
        if new_states:
            bad = (~total.detach().isfinite()).float()
            self.commit(new_states, dist.all_reduce(bad, self.backend.ranks) == 0)
        return total, terms

    def evaluate(
        self, *, texts_begun: dist.Gathering | None = None, **keywords: Any
    ) -> tuple[Tensor, dict[str, Tensor], NewStates]:
        """(total, terms, new_states): as a call, but the state stays.

        `commit` takes the new states, once the step is known to count. texts_begun: the exchange of
        `text` among `gathers_texts_in(step)`, where it is under way.
        """
        inputs = self._inputs(keywords)
        self._check(inputs)
        pairs = Pairs.at(self.backend, inputs.step)
        return evaluated(partial(self._evaluate, pairs, texts_begun), inputs)

    def _evaluate(
        self, pairs: Pairs, texts_begun: dist.Gathering | None, inputs: Inputs
    ) -> tuple[Tensor, dict[str, Tensor], NewStates]:
        inputs = inputs.prepared(self.normalize)
        counts = inputs.step is not None and torch.is_grad_enabled()
        texts = Arriving(inputs.text, pairs.group, texts_begun)
        pairs = replace(pairs, texts=texts)

        # float32 at least: a total of half precision would lose its small terms.
        dtype = torch.float64 if inputs.image.dtype == torch.float64 else torch.float32
        total, terms, new_states = inputs.image.new_zeros((), dtype=dtype), {}, {}
        for plugin in self.plugins:
            pairs_of_term, state = replace(pairs, noted={}), self.state.get(plugin.label, {})
            value, new_state = value_of(plugin, inputs, pairs_of_term, state)
            if new_state and counts:
                new_states[plugin.label] = new_state
            value = value.to(dtype)
            terms[plugin.label] = value.detach()
            for name, share in pairs_of_term.noted.items():
                terms[f"{plugin.label}.{name}"] = share.to(dtype)
            total = total + plugin.common.weight_at(inputs.step) * value

        texts.settle()
        if counts:
            self._gathers_texts = texts.is_asked_for
        return total, terms, new_states

    # State

    def commit(self, new_states: NewStates, counts: Tensor) -> None:
        """Take the states that an evaluation gave where the step `counts`, [] bool and the same on
        all ranks, without waiting for it. Collective if it holds numbers of samples.
        """
        for label, new_state in new_states.items():
            state = self.state[label]
            for name, value in new_state.items():
                # A table stores its rows; other state is replaced.
                if isinstance(value, Write):
                    value.apply(counts)
                else:
                    state[name] = _replaced(state[name], value.detach(), counts)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{label: {name: tensor}}. Collective.

        Numbers of each sample are whole, [samples, c], on the first rank and empty on the others.
        """
        result = {}
        for label, state in self.state.items():
            result[label] = {
                name: value.whole() if isinstance(value, Table) else value.clone()
                for name, value in state.items()
            }
        return result

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name, "LABEL/NAME", and tensor of all state that every rank holds whole."""
        for name, value in self._named_state():
            if not isinstance(value, Table):
                yield name, value

    def tables(self) -> Iterator[tuple[str, Table]]:
        """Name, "LABEL/NAME", and table of what is kept of each sample, dealt over ranks."""
        for name, value in self._named_state():
            if isinstance(value, Table):
                yield name, value

    def _named_state(self) -> Iterator[tuple[str, Tensor | Table]]:
        for label, state in self.state.items():
            for name, value in state.items():
                yield f"{label}/{name}", value

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take what the first rank of any number of ranks saved; every rank brings the whole.

        Collective. ValueError for the state of another objective.
        """
        if state.keys() != self.state.keys():
            raise ValueError(
                f"found objective state of {sorted(state)}, but this objective keeps "
                f"{sorted(self.state)}; resume with the objective of the checkpoint, or start anew "
                "from its weights with init_from"
            )

        for label, tensors in state.items():
            current = self.state[label]
            if tensors.keys() != current.keys():
                raise ValueError(
                    f"state of {label!r} holds {sorted(tensors)}, expected {sorted(current)}"
                )
            for name, tensor in tensors.items():
                if isinstance(current[name], Table):
                    current[name].load(tensor)
                else:
                    current[name] = tensor.clone()

    # Checks: everything that can be refused before a term runs

    def _inputs(self, keywords: dict[str, Any]) -> Inputs:
        # All that is wrong at once, unknown and missing.
        unknown = [
            f"unknown keyword {name!r}{did_you_mean(name, KEYWORDS)}"
            for name in keywords
            if name not in KEYWORDS
        ]
        missing = []
        for label, keywords_of_term in self.required.items():
            for name in sorted(keywords_of_term | ALWAYS):
                instead = INSTEAD.get(name, name)
                if keywords.get(name) is None and keywords.get(instead) is None:
                    missing.append(
                        f"the term {label!r} needs {name!r}, which the call does not carry"
                        f"{_from(name)}: give {name}=… or drop the term"
                    )
        if unknown or missing:
            raise ValueError("; ".join(unknown + missing))

        return Inputs(**{name: value for name, value in keywords.items() if name in self.reads})

    def _check(self, inputs: Inputs) -> None:
        """Refuse inputs that do not fit. The first call exchanges this between ranks, later not."""
        first, alone = self._shapes is None, self.backend.ranks.size == 1
        problems = inputs.problems()

        # Norms are measured again where that is free: on a GPU they are a host sync, and between
        # ranks one rank's error would leave the others waiting.
        if not problems and (first or (alone and not reduction.on_device(inputs.image))):
            problems = inputs.unit_problems(self.normalize)

        shapes = inputs.shapes() if not problems else {}
        if self._shapes is None:
            problems = self._agreed(problems, shapes)
        elif not alone and not problems and shapes != self._shapes:
            problems = [self._changed(shapes)]
        if problems:
            raise ValueError("\n".join(problems))

        # After the shapes, on which ranks have agreed: all of them raise alike.
        self.check_candidates(len(inputs.image))
        self._shapes = self._shapes or shapes

    def _changed(self, shapes: dict[str, tuple[int, ...]]) -> str:
        """What is wrong with shapes that are not the first step's, on several ranks."""
        first = self._shapes or {}
        changed = {
            name: (first.get(name), shape)
            for name, shape in shapes.items()
            if shape != first.get(name)
        }
        return (
            f"shapes changed since the first step, {changed}: ranks would no longer match; "
            "give every step the same rows on every rank, or build another objective"
        )

    def _agreed(self, problems: list[str], shapes: dict[str, tuple[int, ...]]) -> list[str]:
        """The problems of all ranks, or those between them: every rank raises what one found."""
        ranks = self.backend.ranks
        by_rank = dist.gather_objects((problems, shapes), ranks)
        all_problems: dict[str, None] = {}  # a dict keeps their order, and each of them once
        for rank_problems, _ in by_rank:
            all_problems |= dict.fromkeys(rank_problems)
        if all_problems:
            return list(all_problems)

        # Each rank is right by itself: compare them.
        different = []
        for name in sorted(set().union(*(shapes for _, shapes in by_rank))):
            sizes = {
                f"rank {rank}": shapes.get(name) for rank, (_, shapes) in zip(ranks.ranks, by_rank)
            }
            if len(set(sizes.values())) > 1:
                different.append(
                    f"{name} differs between ranks, {sizes}: every rank must bring the same number "
                    "of rows"
                )
        return different

    def check_candidates(self, n_rows: int) -> None:
        """Refuse batches of so many rows on each rank in which a term has too few candidates:
        ValueError, which names the term.
        """
        n = self.candidates(n_rows)
        for plugin in leaves(self.plugins):
            least = getattr(plugin.module, "MIN_CANDIDATES", 1)
            if n < least:
                raise ValueError(
                    f"the term {plugin.label!r} needs at least {least} candidates a row, found "
                    f"{n}: raise the batch size or the group size"
                )
            if isinstance(plugin.options, Candidates):
                try:
                    plugin.options.check_candidates(n)
                except ValueError as error:
                    raise ValueError(f"the term {plugin.label!r}: {error}") from error


def _replaced(old: Tensor, new: Tensor, counts: Tensor) -> Tensor:
    """The new state where the step counts, else the old one."""
    # Before the first step a state may be empty, which stands for zeros.
    kept = old.to(new) if old.shape == new.shape else torch.zeros_like(new)
    return torch.where(counts, new, kept)


def _from(name: str) -> str:
    return f" (it comes from {supplier(name)})" if supplier(name) else ""
