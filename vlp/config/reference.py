"""Every key of the configuration with type, default and sentence, as a plain list.

    for section in sections():
        for key in section.keys: ...

`vlp config` prints it and the documentation's page is made from it, so that both say what the
dataclasses say: a field's sentence is the comment beside or above it, a section's the docstring.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from vlp.config import source
from vlp.config.describe import (
    REQUIRED,
    Slot,
    default_of,
    section_of,
    slot_of,
    type_of,
)
from vlp.config.source import Class, Field, Module
from vlp.schema import ConfigError, Problem

# places that name the same plug-ins as another one, where those are described
_REPEATED = ("validation.data.sources",)


@dataclass(frozen=True)
class Key:
    """One key as the user writes it."""

    key: str  # dotted, as an override names it: train.optimizer.lr, data.sources.N.path
    type: str  # number, text, auto | float32 | bf16, …
    default: str  # as YAML; REQUIRED where there is none, empty for a section of its own
    sentence: str


@dataclass(frozen=True)
class Section:
    """A mapping of the configuration, or a plug-in's options."""

    name: str  # train.optimizer, objective.infonce, data.sources.shards; empty: the root
    sentence: str
    written: str  # its place in YAML: objective: {infonce: {…}}
    keys: tuple[Key, ...]
    package: str = ""  # of plug-ins, where the keys are common to all of a folder


@functools.cache
def sections() -> tuple[Section, ...]:
    """All sections, each before those inside it; plug-ins after what is common to their folder."""
    root = _class("Config", source.read("vlp.config.tree"))
    assert root is not None, "the source text is installed beside the code"
    return tuple(_tree(root, ""))


def _class(name: str, module: Module | None) -> Class | None:
    return None if module is None else source.class_named(ast.Name(name), module)


def _tree(section: Class, name: str, place: str | None = None) -> Iterator[Section]:
    """The section of a dataclass and everything inside it. `place`: where its keys stand, if that
    is not its name: that of a tower's section has the tower in it.
    """
    place = name if place is None else place
    # The keys of a section stand together, before the sections inside it.
    fields = source.fields_of(section).values()
    prefix = f"{place}." if place else ""
    keys = tuple(_key(field, prefix) for field in fields)

    yield Section(name, section.summary, _written(place), keys)

    for field in fields:
        inner_name = prefix + field.name
        slot = slot_of(field.annotation, inner_name)
        inner = section_of(field)
        if slot is not None and slot.name in _REPEATED:
            continue
        if slot is not None:
            yield from _plugins(slot, _key(field, prefix).sentence)
        elif inner is not None:
            yield from _tree(inner, inner_name)


def _plugins(slot: Slot, sentence: str) -> Iterator[Section]:
    """What is common to a folder of plug-ins, under the sentence of its key; then each of them."""
    folder = source.read(slot.package)
    assert folder is not None, slot.package

    # Once for all plug-ins: repeated under each, a weight would be there thirty times.
    common = _class("Common", folder)
    keys = () if common is None else _keys(common, slot.key_prefix("NAME"))

    yield Section(slot.name, sentence, slot.written("NAME"), keys, slot.package)

    for module in source.plugins(slot.package):
        if not slot.holds(module):
            continue
        plugin = module.name.rpartition(".")[2]

        options = _class("Options", module)
        assert options is not None, f"{module.name} has no Options"

        keys = _keys(options, slot.key_prefix(plugin))
        yield Section(f"{slot.name}.{plugin}", module.summary, slot.written(plugin), keys)

        # A plug-in's options may hold sections of their own.
        for field in source.fields_of(options).values():
            inner = section_of(field)
            if inner is not None:
                inner_name = f"{slot.name}.{plugin}.{field.name}"
                yield from _tree(inner, inner_name, slot.key_prefix(plugin) + field.name)


def _keys(section: Class, prefix: str) -> tuple[Key, ...]:
    return tuple(_key(field, prefix) for field in source.fields_of(section).values())


def _key(field: Field, prefix: str) -> Key:
    # A section is explained by its own docstring.
    inner = section_of(field)
    sentence = field.sentence
    if not sentence and inner is not None:
        sentence = inner.summary

    # The comments are written for Python, the reference for YAML.
    in_yaml = re.sub(r"\bNone\b", "null", sentence)
    return Key(prefix + field.name, type_of(field), default_of(field), in_yaml)


def _written(name: str) -> str:
    """A section's place in YAML."""
    text = "{…}"

    # From the inside: {optimizer: {…}}, then train: around it.
    for part in reversed(name.split(".")[1:]):
        text = f"{{{part}: {text}}}"
    return f"{name.split('.')[0]}: {text}" if name else "the file itself"


def find(name: str) -> list[Section]:
    """The sections that a name means: a section with all inside it, the end of its name, a folder
    of plug-ins (losses, towers, tasks) or a single key; ConfigError suggests the near one.
    """
    everything = sections()

    # A full name first: `train` means the section, not every key that ends so.
    inside = [section for section in everything if _lies_in(section, name)]
    if inside:
        return inside

    # Then the end of a name, which is how a recipe shows it: image_tower, zeroshot.
    roots = [
        section.name
        for section in everything
        if section.name.endswith(f".{name}") or section.package.endswith(f".{name}")
    ]
    if roots:
        return [s for s in everything if any(_lies_in(s, root) for root in roots)]

    # Then a single key.
    keys = _with_keys(lambda key: f".{key.key}".endswith(f".{name}"))
    if keys:
        return keys

    message = f"the configuration has no section or key {name!r}{_near(name)}"
    raise ConfigError([Problem((), message)])


def _lies_in(section: Section, name: str) -> bool:
    return f"{section.name}.".startswith(f"{name}.")


def search(word: str) -> list[Section]:
    """The sections cut down to the keys that hold `word` in name, type or sentence; ConfigError
    where no key does.
    """
    wanted = _folded(word)
    hits = _with_keys(lambda key: wanted in _folded(f"{key.key} {key.type} {key.sentence}"))
    if not hits:
        message = f"no key says anything of {word!r}{_near(word)}"
        raise ConfigError([Problem((), message)])
    return hits


def _with_keys(is_wanted: Callable[[Key], bool]) -> list[Section]:
    """The sections that hold wanted keys, with those alone."""
    hits = []
    for section in sections():
        keys = tuple(key for key in section.keys if is_wanted(key))
        if keys:
            hits.append(replace(section, keys=keys))
    return hits


def _folded(text: str) -> str:
    """Without case, hyphens and underscores: warm-up is warmup."""
    return text.lower().replace("-", "").replace("_", "")


def _near(name: str) -> str:
    names = {section.name for section in sections() if section.name}
    names |= {key.key for key in chain.from_iterable(section.keys for section in sections())}
    names |= {full.rpartition(".")[2] for full in names}
    close = difflib.get_close_matches(name, sorted(names), n=1)
    if close:
        return f", did you mean {close[0]!r}?"

    # All three hundred would hide the message.
    outermost = ", ".join(key.key for key in sections()[0].keys)
    return f"; known: {outermost}; vlp config --search WORD looks everywhere"


def lines(chosen: Iterable[Section]) -> Iterator[str]:
    """Sections as the terminal shows them."""
    for section in chosen:
        yield f"{section.name or 'configuration'}    {section.written}"
        yield _indented(section.sentence, 2)
        for key in section.keys:
            yield ""
            yield f"  {_assignment(key)}    ({key.type})"
            yield _indented(key.sentence, 6)
        yield ""


def _assignment(key: Key) -> str:
    if key.default == REQUIRED:
        return f"{key.key}, {REQUIRED}"
    return f"{key.key} = {key.default}" if key.default else key.key


def _indented(sentence: str, n_blanks: int) -> str:
    margin = " " * n_blanks
    return textwrap.fill(sentence, 96, initial_indent=margin, subsequent_indent=margin)
