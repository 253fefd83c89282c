"""Sections and keys of the configuration, read from its dataclasses: type, default and the comment
beside or above a field.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass

from vlp import plugin
from vlp.config import Config

PLUGINS = {
    "data.sources": "vlp.data.sources",
    "image_tower": "vlp.towers",
    "objective": "vlp.losses",
    "selection": "vlp.selection",
    "eval": "vlp.eval.tasks",
}


@dataclass(frozen=True)
class Key:
    name: str
    type: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Section:
    name: str
    summary: str
    keys: list[Key]


def sections() -> list[Section]:
    """The tree's sections, then every plug-in's."""
    found = _of_tree(Config, "")
    for prefix, package in PLUGINS.items():
        for name in plugin.names(package):
            module = plugin.load(package, name)
            summary = (module.__doc__ or "").split("\n\n")[0]
            found.append(Section(f"{prefix}.{name}", summary, _keys(module.Options)))
    return found


def _of_tree(cls: type, name: str) -> list[Section]:
    summary = inspect.getdoc(cls) or ""
    found = [Section(name, summary.split("\n\n")[0], _keys(cls))]
    for key, hint in typing.get_type_hints(cls).items():
        for choice in (hint, *typing.get_args(hint)):
            is_section = dataclasses.is_dataclass(choice) and not hasattr(choice, "from_config")
            if is_section and choice.__module__.startswith("vlp.config"):
                found += _of_tree(choice, f"{name}.{key}".lstrip("."))
    return found


def _keys(cls: type) -> list[Key]:
    source = inspect.getsource(cls)
    keys = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if hasattr(default, "to_config"):
            default = default.to_config()
        shown = "" if default is dataclasses.MISSING else repr(default)
        if dataclasses.is_dataclass(default):
            shown = "its own defaults"
        keys.append(Key(field.name, str(field.type), shown, _sentence(source, field.name)))
    return keys


def _sentence(source: str, name: str) -> str:
    """The comment above a field, or inside of its statement."""
    found = re.search(
        rf"((?:^ +#[^\n]*\n)*)^ +{name}:(.*?)(?=^ +(?:#|\w+:|def |@)|\Z)", source, re.M | re.S
    )
    if not found:
        return ""
    comments = re.findall(r"#\s*(.*)", found[1]) or re.findall(r"\s#\s+(.*)", found[2])
    return " ".join(comments)
