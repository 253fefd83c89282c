"""The folder is the registry: `name: siglip` means the file `vlp/losses/siglip.py`.

A plug-in file holds a frozen dataclass `Options` (its configuration keys, one comment a field) and the functions its
folder's contract asks for. Two ways to name plug-ins in a configuration, both validated here so that `vlp.config`
needs no import of the rooms above it:

    image_tower: {name: timm, model: resnet50}          ->  Annotated[Plugin, Named("vlp.towers")]
    objective: {infonce: {}, uniformity: {weight: .5}}  ->  Annotated[KeyedPlugins, Keyed("vlp.losses")]

In the keyed form a value may be a list of mappings (the same plug-in several times). A folder whose
`__init__` holds a dataclass `Common` takes those keys for every plug-in (a term's weight, a
source's share, a task's schedule).
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

from vlp.schema import ConfigError, Path, Problem, did_you_mean, parse_into, plain


@dataclass(frozen=True)
class Plugin:
    """A chosen plug-in with its validated options."""

    package: str
    name: str
    options: Any  # an instance of the file's Options
    common: Any = None  # an instance of the folder's Common, where it has one
    label: str = ""  # the name under which results are logged; unique among its neighbours

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(f"{self.package}.{self.name}")

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, **plain(self.common or {}), **plain(self.options)}


def names(package: str) -> list[str]:
    """All plug-ins of a folder: its public modules (no leading underscore)."""
    folder = importlib.import_module(package)
    return sorted(
        m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")
    )


def load(package: str, name: str) -> ModuleType:
    """Import a plug-in by name; a ValueError names what exists."""
    if name not in names(package):
        raise ValueError(f"no {name!r} in {package}{did_you_mean(str(name), names(package))}")
    return importlib.import_module(f"{package}.{name}")


@dataclass(frozen=True)
class Named:
    """Schema hook for `{name: plug-in, option: value, …}`."""

    package: str

    def parse(self, value: Any, path: Path, problems: list[Problem]) -> Plugin | None:
        if isinstance(value, Plugin):
            return value
        if not isinstance(value, dict) or "name" not in value:
            problems.append(
                Problem(
                    path,
                    f"found {value!r}, expected a mapping with the key 'name': one of {names(self.package)}",
                )
            )
            return None
        rest = {key: item for key, item in value.items() if key != "name"}
        return _plugin(self.package, value["name"], rest, path, problems)


@dataclass(frozen=True)
class Keyed:
    """Schema hook for `{plug-in: {option: value}, …}`; each value may also be a list of such
    mappings, or null.
    """

    package: str

    def parse(self, value: Any, path: Path, problems: list[Problem]) -> KeyedPlugins:
        if isinstance(value, KeyedPlugins):
            return value
        if not isinstance(value, dict):
            problems.append(
                Problem(
                    path,
                    f"found {value!r}, expected a mapping from {names(self.package)} to their options",
                )
            )
            return KeyedPlugins()
        found = []
        for name, options in value.items():
            several = isinstance(options, list)
            for i, item in enumerate(options if several else [options]):
                where = (*path, name, i) if several else (*path, name)
                found.append(
                    _plugin(self.package, name, {} if item is None else item, where, problems)
                )
        return KeyedPlugins(_unique_labels([p for p in found if p is not None]))


class KeyedPlugins(list):
    """A list of plug-ins that writes itself back as the mapping it was read from."""

    def to_config(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for plugin in self:
            options = {**plain(plugin.common or {}), **plain(plugin.options)}
            result.setdefault(plugin.name, []).append(options)
        return {name: items[0] if len(items) == 1 else items for name, items in result.items()}


def keyed(package: str, mapping: Any) -> KeyedPlugins:
    """Parse the keyed form outside a configuration file; raises ConfigError with all problems."""
    problems: list[Problem] = []
    result = Keyed(package).parse(mapping, (), problems)
    if problems:
        raise ConfigError(problems)
    return result


def _plugin(
    package: str, name: Any, mapping: Any, path: Path, problems: list[Problem]
) -> Plugin | None:
    try:
        module = load(package, name)
    except ValueError as error:
        problems.append(Problem(path, str(error)))
        return None
    if not isinstance(mapping, dict):
        problems.append(
            Problem(path, f"found {mapping!r}, expected a mapping of options for {name!r}")
        )
        return None
    common = getattr(importlib.import_module(package), "Common", None)
    shared = {f.name for f in fields(common)} if common else set()
    known = shared | {f.name for f in fields(module.Options)}
    before = len(problems)
    problems += [
        Problem((*path, k), f"unknown key {k!r}{did_you_mean(str(k), known)}")
        for k in mapping
        if k not in known
    ]
    mapping = {k: v for k, v in mapping.items() if k in known}
    base = (
        parse_into(common, {k: v for k, v in mapping.items() if k in shared}, path, problems)
        if common
        else None
    )
    options = parse_into(
        module.Options, {k: v for k, v in mapping.items() if k not in shared}, path, problems
    )
    label = module.label(options) if hasattr(module, "label") and len(problems) == before else name
    return Plugin(package, name, options, base, label) if len(problems) == before else None


def _unique_labels(plugins: list[Plugin]) -> list[Plugin]:
    """Number the second and later plug-ins of one label: own, own_2, own_3."""
    seen: dict[str, int] = {}
    result = []
    for p in plugins:
        seen[p.label] = seen.get(p.label, 0) + 1
        label = p.label if seen[p.label] == 1 else f"{p.label}_{seen[p.label]}"
        result.append(Plugin(p.package, p.name, p.options, p.common, label))
    return result
