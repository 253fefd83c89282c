"""Sections and keys of the configuration, read from its dataclasses: type, default, and the
comment beside or above a field. `vlp.config.reference` replaces it.
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
    key: str
    type: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Section:
    name: str
    sentence: str
    keys: list[Key]


def sections() -> list[Section]:
    """The tree's sections, then every plug-in's."""
    known = _of_tree(Config, "")
    for prefix, package in PLUGINS.items():
        for name in plugin.names(package):
            module = plugin.load(package, name)
            summary = (module.__doc__ or "").split("\n\n")[0]
            section = f"{prefix}.{name}"
            known.append(Section(section, summary, _keys(module.Options, f"{section}.")))
    return known


def _of_tree(cls: type, name: str) -> list[Section]:
    """A section and those below it."""
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0]
    known = [Section(name, summary, _keys(cls, f"{name}." if name else ""))]
    for key, hint in typing.get_type_hints(cls).items():
        for choice in (hint, *typing.get_args(hint)):
            # A class that reads itself, such as a duration, is a value and no section.
            is_section = dataclasses.is_dataclass(choice) and not hasattr(choice, "from_config")
            if is_section and choice.__module__.startswith("vlp.config"):
                known += _of_tree(choice, f"{name}.{key}".lstrip("."))
    return known


def _keys(cls: type, prefix: str) -> list[Key]:
    # Comments are in the text alone, not in the class.
    source = inspect.getsource(cls)
    return [
        Key(prefix + field.name, str(field.type), _default(field), _sentence(source, field.name))
        for field in dataclasses.fields(cls)
    ]


def _default(field: dataclasses.Field) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if hasattr(default, "to_config"):
        default = default.to_config()

    # A section of its own shows its keys elsewhere.
    if default is dataclasses.MISSING:
        return "required"
    return "" if dataclasses.is_dataclass(default) else str(default)


def _sentence(source: str, name: str) -> str:
    """The comment above a field, or inside of its statement."""
    above, statement = r"((?:^ +#[^\n]*\n)*)", r"(.*?)(?=^ +(?:#|\w+:|def |@)|\Z)"
    field = re.search(rf"{above}^ +{name}:{statement}", source, re.MULTILINE | re.DOTALL)
    if not field:
        return ""
    comments = re.findall(r"#\s*(.*)", field[1]) or re.findall(r"\s#\s+(.*)", field[2])
    return " ".join(comments)
