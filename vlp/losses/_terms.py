"""What is asked of the terms of an objective by what their files hold (see `_objective`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlp.losses._common import Schedule
from vlp.losses._inputs import Inputs
from vlp.losses._table import Write
from vlp.pairwise import Pairs
from vlp.plugin import Plugin


def value_of(
    plugin: Plugin,
    inputs: Inputs,
    pairs: Pairs,
    state: Mapping[str, Any],  # as `state_of` made it
) -> tuple[Tensor, dict[str, Tensor | Write]]:
    """(value, new state) of one term; the new state of a term without one is empty."""
    # A term does not know its label: errors get it here.
    stateful = keeps_state(plugin)
    arguments = [state] if stateful else []
    try:
        result = plugin.module.term(inputs, pairs, plugin.options, *arguments)
    except ValueError as error:
        raise ValueError(f"the term {plugin.label!r}: {error}") from error
    return result if stateful else (result, {})


def keeps_state(plugin: Plugin) -> bool:
    """Whether a term takes and returns a state, be it empty with these options."""
    return hasattr(plugin.module, "initial_state")


def state_of(plugin: Plugin) -> dict[str, Any]:
    """The state that a term begins with; empty where it keeps none."""
    return plugin.module.initial_state(plugin.options) if keeps_state(plugin) else {}


def needs(plugin: Plugin) -> frozenset[str]:
    """The keywords without which a term cannot run."""
    module = plugin.module
    return frozenset(module.needs(plugin.options) if hasattr(module, "needs") else module.NEEDS)


def optional(plugin: Plugin) -> frozenset[str]:
    """The keywords that a term reads where the call carries them."""
    module = plugin.module
    if hasattr(module, "optional"):
        return frozenset(module.optional(plugin.options))
    return frozenset(getattr(module, "OPTIONAL", ()))


def reads(plugins: Iterable[Plugin]) -> frozenset[str]:
    """The keywords that some of the terms read, needed or not."""
    keywords: frozenset[str] = frozenset()
    for plugin in plugins:
        keywords |= needs(plugin) | optional(plugin)
    return keywords


def min_views(plugin: Plugin) -> int:
    """How many further views of each image a term needs."""
    module = plugin.module
    if hasattr(module, "min_views"):
        n_views: int = module.min_views(plugin.options)
        return n_views
    return getattr(module, "MIN_VIEWS", 0)


def leaves(plugins: Iterable[Plugin]) -> Iterator[Plugin]:
    """The terms; in place of one that wraps others, those, as WRAPPER.LABEL."""
    for plugin in plugins:
        if not hasattr(plugin.module, "wrapped"):
            yield plugin
            continue
        for inner in leaves(plugin.module.wrapped(plugin.options)):
            yield replace(inner, label=f"{plugin.label}.{inner.label}")


def own_scale(plugins: Iterable[Plugin]) -> tuple[str, float] | None:
    """The term whose temperature is the objective's, and its 1/temperature; None where a term
    learns the model's scale, or none has a temperature of its own.
    """
    plugins = list(leaves(plugins))
    if any("scale" in needs(plugin) for plugin in plugins):
        return None

    for plugin in plugins:
        if hasattr(plugin.module, "exported_scale"):
            return plugin.label, plugin.module.exported_scale(plugin.options)
    return None


def check_width(plugins: Iterable[Plugin], width: int) -> None:
    """Refuse terms that do not fit embeddings of D = `width`: ValueError, which names the term."""
    for plugin in plugins:
        if not hasattr(plugin.module, "check_width"):
            continue
        try:
            plugin.module.check_width(plugin.options, width)
        except ValueError as error:
            raise ValueError(f"the term {plugin.label!r}: {error}") from error


def check_modalities(plugins: Iterable[Plugin], names: list[str], width: int, n: int) -> None:
    """Refuse terms that cannot compare modalities of these names in D = `width` numbers and n
    candidates: ValueError, which names the term.
    """
    for plugin in plugins:
        if not hasattr(plugin.module, "check_modalities"):
            continue
        try:
            plugin.module.check_modalities(plugin.options, names, width, n)
        except ValueError as error:
            raise ValueError(f"the term {plugin.label!r}: {error}") from error


def for_run(plugin: Plugin, samples: int | None, steps: int | None) -> Plugin:
    """The term with what only the run knows.

    ValueError for a schedule that the run is too short for.
    """
    weight = plugin.common.weight
    if isinstance(weight, Schedule) and steps is not None and weight.steps > steps:
        raise ValueError(
            f"objective.{plugin.name}.weight moves over {weight.steps:,} steps, but the run has "
            f"{steps:,}: it would never reach {weight.end:g}; lower its steps, or name the value "
            "at the run's end"
        )

    if not hasattr(plugin.module, "for_run"):
        return plugin
    return replace(plugin, options=plugin.module.for_run(plugin.options, samples, steps))
