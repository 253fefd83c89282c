"""The folder is the registry: `name: siglip` means the file `vlp/losses/siglip.py`.

A plug-in file holds a frozen dataclass `Options` (its configuration keys, one comment a field) and
the functions its folder's contract asks for. Two ways to name plug-ins in a configuration, both
validated here so that `vlp.config` needs no import of the rooms above it:

    image_tower: {name: timm, model: resnet50}          Annotated[Plugin, Named("vlp.towers")]
    objective: {infonce: {}, uniformity: {weight: .5}}  Annotated[KeyedPlugins, Keyed("vlp.losses")]

In the keyed form a value may be a list of mappings (the same plug-in several times). A folder whose
`__init__` holds a dataclass `Common` takes those keys for every plug-in (a term's weight, a
source's share, a task's schedule).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
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
    modules = [module.name for module in pkgutil.iter_modules(folder.__path__)]
    return sorted(name for name in modules if not name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    """Import a plug-in by name; a ValueError names what exists."""
    # Listed before it is imported: no name from a file reaches the import otherwise.
    known = names(package)
    if name not in known:
        raise ValueError(f"no {name!r} in {package}{did_you_mean(str(name), known)}")
    return importlib.import_module(f"{package}.{name}")


def is_function_reference(text: str) -> bool:
    """Whether a text is written as package.module:function."""
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def own_function(
    reference: str, place: str, expected: str = "package.module:function"
) -> Callable[..., Any]:
    """The user's function that package.module:function names.

    place: the key or option that names it, and expected: what it may say, for messages. ValueError
    where there is no such function, or where its module fails.
    """
    if not is_function_reference(reference):
        raise ValueError(f"{place} {reference!r}: expected {expected}")

    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{place} {reference!r}: {error}; expected {expected}, in a module that python finds "
            "(PYTHONPATH)"
        ) from None
    # A module of the user's runs as it is imported, and may fail by anything, or leave.
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{place} {reference!r}: importing {module} failed: {type(error).__name__}: "
            f"{str(error)[:300]}; mend it, until python -c 'import {module}' works"
        ) from error
    if not callable(function):
        raise ValueError(f"{place} {reference!r} is no function: {str(function)[:60]}")
    return function


@dataclass(frozen=True)
class Named:
    """Schema hook for `{name: plug-in, option: value, …}`."""

    package: str

    def parse(self, value: Any, path: Path, problems: list[Problem]) -> Plugin | None:
        if isinstance(value, Plugin):
            return value
        if not isinstance(value, dict) or "name" not in value:
            message = (
                f"found {value!r}, expected a mapping with the key 'name': "
                f"one of {names(self.package)}"
            )
            problems.append(Problem(path, message))
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
            message = (
                f"found {value!r}, expected a mapping from {names(self.package)} to their options"
            )
            problems.append(Problem(path, message))
            return KeyedPlugins()

        plugins = []
        for name, options in value.items():
            # One term several times, with other options: hard_negatives: [{…}, {…}].
            is_list = isinstance(options, list)
            for i, item in enumerate(options if is_list else [options]):
                item_path = (*path, name, i) if is_list else (*path, name)
                mapping = {} if item is None else item  # `infonce:` with nothing behind it
                plugin = _plugin(self.package, name, mapping, item_path, problems)
                if plugin is not None:
                    plugins.append(plugin)
        return KeyedPlugins(_unique_labels(plugins))


class KeyedPlugins(list[Plugin]):
    """A list of plug-ins that writes itself back as the mapping it was read from."""

    def to_config(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for plugin in self:
            options = {**plain(plugin.common or {}), **plain(plugin.options)}
            result.setdefault(plugin.name, []).append(options)

        # As it was written: a list only where there are several.
        for name, items in result.items():
            if len(items) == 1:
                result[name] = items[0]
        return result


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
    """The plug-in of this name with its options read from `mapping`, or None after a problem."""
    try:
        module = load(package, name)
    except ValueError as error:
        problems.append(Problem(path, str(error)))
        return None
    if not isinstance(mapping, dict):
        message = f"found {mapping!r}, expected a mapping of options for {name!r}"
        problems.append(Problem(path, message))
        return None

    common_class = getattr(importlib.import_module(package), "Common", None)
    common_keys = {field.name for field in fields(common_class)} if common_class else set()
    known = common_keys | {field.name for field in fields(module.Options)}

    # Both classes read a part of the mapping, so what neither knows has to be told here.
    n_before = len(problems)
    for key in mapping:
        if key not in known:
            suggestion = did_you_mean(str(key), known)
            problems.append(Problem((*path, key), f"unknown key {key!r}{suggestion}"))

    common = None
    if common_class:
        shared = {key: value for key, value in mapping.items() if key in common_keys}
        common = parse_into(common_class, shared, path, problems)
    own_keys = known - common_keys
    rest = {key: value for key, value in mapping.items() if key in own_keys}
    options = parse_into(module.Options, rest, path, problems)
    if len(problems) > n_before:
        return None

    # Forms of one family are told apart in the log by the label.
    label = module.label(options) if hasattr(module, "label") else name
    return Plugin(package, name, options, common, label)


def _unique_labels(plugins: list[Plugin]) -> list[Plugin]:
    """Number the second and later plug-ins of one label: own, own_2, own_3."""
    # Labels are keys of the metrics; two equal ones would overwrite each other.
    counts: Counter[str] = Counter()
    result = []
    for plugin in plugins:
        counts[plugin.label] += 1
        number = counts[plugin.label]
        label = plugin.label if number == 1 else f"{plugin.label}_{number}"
        result.append(replace(plugin, label=label))
    return result
