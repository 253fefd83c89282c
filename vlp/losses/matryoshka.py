"""Matryoshka representations: objectives over the first m numbers of the embeddings, for several m.

    L = Σ_m c_m Σ_k w_k·L_k(x_[1:m]/‖x_[1:m]‖, t_[1:m]/‖t_[1:m]‖, …)

x, t: [b, D] images and texts; m runs through `widths`, and L_k with weights w_k are the terms of
`of`. Every row of width D that a term reads is cut and normalised anew, those of captions, hard
captions and a queue as well; a teacher's rows, masks and numbers stay whole. Each L_k of each width
is logged beside L, as matryoshka.infonce_64.

Relations:
- with the one width D it has the value of its terms
- c_m is 1/M of M widths unless `weights` says otherwise: the paper's sum is `weights` of 1

Papers:
- MRL (arXiv 2205.13147), of both towers, at half, a quarter, … of D:
  `objective: {matryoshka: {of: {infonce: {}}}}`
- MRL with its c_m of 1: `objective: {matryoshka: {widths: [64, 128, 256], weights: [1, 1, 1]}}`

Needs: image, text, scale; in place of scale, and beside the three, what the terms of `of` need

Cost: the terms' passes once a width, of m columns each; O(b·Σm) memory, 2·b·D for the default; rows
of half precision are cut as float32

Use: where embeddings are stored or searched: one model then serves every width (`vlp eval --width`,
`vlp export --width`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from vlp.fields import EMBEDDED, FIELDS, Field
from vlp.losses import _terms
from vlp.losses._common import Common, Schedule
from vlp.losses._inputs import Inputs
from vlp.losses._table import Write
from vlp.pairwise import Pairs, widened
from vlp.plugin import Keyed, KeyedPlugins, Plugin, keyed

NARROWEST = 8  # of the widths that are taken where none are named
_PACKAGE = "vlp.losses"
# What comes of a teacher's width, which a prefix cannot be compared with.
_WHOLE = frozenset({"projected_image", "projected_text"})


def _has_embedding_width(row: Field) -> bool:
    """Whether a field's last dimension is D: `b D`, `b K D`, but not a teacher's `b D'`."""
    return row.unit and all(shape.split()[-1] == "D" for shape in row.shapes)


# Embeddings of texts that a batch carries, in any number a sample.
_TEXTS = frozenset(
    name for name, row in EMBEDDED.items() if row.tower == "text" and _has_embedding_width(row)
) - {"text_views"}


@dataclass(frozen=True)
class Options:
    # m, how many numbers of an embedding, in any order; null: D, D/2, D/4, … down to 8
    widths: list[int] | None = None
    # c_m of each width; null: 1/M each, the mean over the M widths (the paper's sum: 1 each)
    weights: list[float] | None = None
    # the terms of each width, as in objective; empty: infonce alone
    of: Annotated[KeyedPlugins, Keyed("vlp.losses")] = field(default_factory=KeyedPlugins)

    def __post_init__(self) -> None:
        if self.widths is not None:
            self._check_widths(self.widths)
        if self.weights is not None:
            self._check_weights(self.weights)
        for plugin in self.of:
            _check_term(plugin, self.widths)

    def _check_widths(self, widths: list[int]) -> None:
        if not widths or min(widths) < 1 or len(set(widths)) < len(widths):
            raise ValueError(
                f"widths: found {widths}, expected different whole numbers of at least 1, such as "
                "[64, 128, 256]"
            )

    def _check_weights(self, weights: list[float]) -> None:
        if self.widths is None:
            raise ValueError("weights: belong to widths; name those, a weight each")
        if len(weights) != len(self.widths):
            raise ValueError(
                f"weights: found {len(weights)} for {len(self.widths)} widths; give a weight each"
            )
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"weights: found {weights}, expected numbers >= 0, not all of them 0")

    @property
    def terms(self) -> KeyedPlugins:
        """The terms of each width."""
        return self.of or keyed(_PACKAGE, {"infonce": {}})

    def at(self, width: int) -> list[tuple[int, float]]:
        """(m, c_m) of each width, for embeddings of D = `width`."""
        widths = self.widths or _halvings(width)
        weights = self.weights or [1 / len(widths)] * len(widths)
        return list(zip(widths, weights))


def _check_term(plugin: Plugin, widths: list[int] | None) -> None:
    """Refuse a term that no prefix of the embeddings can be given to. ValueError."""
    reads = _terms.needs(plugin) | _terms.optional(plugin)
    if hasattr(plugin.module, "wrapped"):
        problem = "a wrapper in a wrapper; name its terms here"
    elif "image" not in reads or not reads & _TEXTS:
        problem = "it does not read the embeddings of image and text; let it stand beside this one"
    elif reads & _WHOLE:
        problem = "it compares with a teacher's rows, which are whole; let it stand beside this one"
    elif hasattr(plugin.module, "asks") and plugin.module.asks(plugin.options) is not None:
        problem = "its candidates are those of whole embeddings; let it stand beside this one"
    elif isinstance(plugin.common.weight, Schedule):
        problem = "a weight that moves stands at matryoshka itself; give this one a number"
    elif widths is None and _terms.state_of(plugin):
        problem = "it keeps numbers of each width; name the widths"
    else:
        return
    raise ValueError(f"of.{plugin.label}: {problem}")


def _halvings(width: int) -> list[int]:
    """D, D/2, D/4, … while they are at least NARROWEST; D alone where it is less."""
    widths = [width]
    while widths[-1] // 2 >= NARROWEST:
        widths.append(widths[-1] // 2)
    return widths


# --- what the objective asks of a term ------------------------------------------------------------


def wrapped(options: Options) -> KeyedPlugins:
    return options.terms


def needs(options: Options) -> frozenset[str]:
    return frozenset().union(*map(_terms.needs, options.terms))


def optional(options: Options) -> frozenset[str]:
    return frozenset().union(*map(_terms.optional, options.terms))


def for_run(options: Options, samples: int | None, steps: int | None) -> Options:
    terms = [_terms.for_run(plugin, samples, steps) for plugin in options.of]
    return replace(options, of=KeyedPlugins(terms))


def check_width(options: Options, width: int) -> None:
    """Refuse widths beyond D = `width`. ValueError."""
    if options.widths is not None and max(options.widths) > width:
        raise ValueError(
            f"widths: found {max(options.widths)}, but the embeddings have {width} numbers; name "
            f"at most {width}"
        )


def check_modalities(options: Options, names: list[str], width: int, n: int) -> None:
    """Refuse modalities that a term cannot compare at the narrowest width. ValueError."""
    narrowest = min(m for m, _ in options.at(width))
    _terms.check_modalities(options.terms, names, narrowest, n)


def initial_state(options: Options) -> dict[str, Any]:
    """The states of its terms, one of each width, as WIDTH.LABEL.NAME."""
    state = {}
    for width in options.widths or []:
        for plugin in options.terms:
            for name, value in _terms.state_of(plugin).items():
                state[f"{width}.{plugin.label}.{name}"] = value
    return state


# --- the value ------------------------------------------------------------------------------------


def term(
    inputs: Inputs, pairs: Pairs, options: Options, state: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor | Write]]:
    """This rank's share of L, and the new states of its terms."""
    embedding_width = inputs.image.shape[1]
    check_width(options, embedding_width)

    total = inputs.image.new_zeros(())
    new_state: dict[str, Tensor | Write] = {}
    for width, weight in options.at(embedding_width):
        narrow = cut(inputs, width)
        for plugin in options.terms:
            value, new = _at_width(plugin, narrow, pairs, width, state)
            common: Common = plugin.common
            total = total + weight * common.weight_at(inputs.step) * value
            new_state |= new
    return total, new_state


def _at_width(
    plugin: Plugin, narrow: Inputs, pairs: Pairs, width: int, state: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor | Write]]:
    """(value, new state under its full names) of one term at one width."""
    prefix = f"{width}.{plugin.label}."
    state_of_term = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    pairs_of_term = replace(pairs, noted={})
    value, new = _terms.value_of(plugin, narrow, pairs_of_term, state_of_term)

    label = f"{plugin.label}_{width}"
    pairs.note(label, value)
    for name, share in pairs_of_term.noted.items():
        pairs.note(f"{label}.{name}", share)
    return value, {f"{prefix}{name}": tensor for name, tensor in new.items()}


def cut(inputs: Inputs, width: int) -> Inputs:
    """The inputs with the first `width` numbers of all rows of the model's width, as unit rows."""
    changed: dict[str, Any] = {
        name: unit_prefix(value, width)
        for name, value in inputs.tensors().items()
        if _has_embedding_width(FIELDS[name])
    }
    return replace(inputs, **changed)


def unit_prefix(
    rows: Tensor,  # [..., D]
    width: int,
) -> Tensor:  # [..., width]
    """The first numbers of each row, divided by their norm; zeros stay zeros.

    Half precision becomes float32: a prefix is no row that a tower rounded, and would be rounded
    a second time.
    """
    prefix = widened(rows[..., :width])
    norms = torch.linalg.vector_norm(prefix, dim=-1, keepdim=True)
    # Rows that take no part are zeros: divided by a tiny norm their gradient would overflow.
    return prefix / torch.where(norms > 0, norms, 1)
