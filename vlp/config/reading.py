"""From YAML and dotted overrides to a `Config`, and back."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlp import privacy, schema
from vlp.config.tree import Config
from vlp.schema import ConfigError, Problem, did_you_mean


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply `section.key=value` overrides (values are YAML) and validate; raises
    ConfigError.

    Secrets that a run's config.yaml leaves out must be given again by the overrides.
    """
    tree, lines = _read(Path(path), overrides or [])
    hidden = list(privacy.hidden_keys(tree))
    if hidden:
        again = " ".join(f"{key}=…" for key in hidden)
        message = (
            f"{path} leaves out secrets, which no run writes down; give them again ({again}), or use "
            "the configuration that the run was started with"
        )
        raise ConfigError([Problem((), message)])
    return parse(tree, lines)


def recorded(path: str | Path) -> Config:
    """The configuration that `dump` wrote, for what it says besides its secrets."""
    return parse(*_read(Path(path), []))


def _read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """A YAML file with overrides applied, and where each of its values stands."""
    try:
        tree, lines = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        known = [*shipped(), *map(str, path.parent.glob("*.y*ml"))]
        raise ConfigError(
            [Problem((), f"no configuration file {path}{did_you_mean(str(path), known)}")]
        ) from None
    except IsADirectoryError:
        files = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))) or "none"
        raise ConfigError(
            [Problem((), f"{path} is a folder; name a YAML file (in it: {files})")]
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            [Problem((), f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})")]
        ) from None
    for override in overrides:
        _override(tree, override, lines)
    privacy.learn(tree)
    return tree, lines


def parse(tree: dict[str, Any], lines: dict[schema.Path, str] | None = None) -> Config:
    """Validate a plain mapping; raises ConfigError naming every problem, at its line where `lines`
    knows it.
    """
    try:
        return schema.parse(Config, tree)
    except ConfigError as error:
        raise ConfigError(error.problems, lines) from None


def shown(config: Any) -> Any:
    """A configuration as plain values, with its secrets hidden: the form in which it leaves this
    process.
    """
    return privacy.without_secrets(schema.plain(config))


def dump(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back, without secrets (vlp.privacy)."""
    return yaml.safe_dump(shown(config), sort_keys=False, allow_unicode=True)


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {p.stem: p for p in sorted(Path(str(resources.files("vlp.configs"))).glob("*.yaml"))}


def find(name: str) -> Path:
    """A configuration's file by path, or by the name of a shipped one."""
    return (
        Path(name)
        if Path(name).is_file()
        else shipped().get(name.removesuffix(".yaml"), Path(name))
    )


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """Parse YAML into plain values and a map from each value's path to "file:line"; duplicate keys
    are an error.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError([Problem((), f"{name}: not valid YAML: {error}")]) from None
    if not isinstance(values, dict):
        raise ConfigError(
            [
                Problem(
                    (),
                    f"{name}: found {type(values).__name__}, expected a mapping of keys to values",
                )
            ]
        )
    lines: dict[schema.Path, str] = {(): name}
    problems: list[Problem] = []
    _mark(root, (), name, lines, problems)
    if problems:
        raise ConfigError(problems, lines)
    return values, lines


def _mark(
    node: yaml.Node,
    path: schema.Path,
    name: str,
    lines: dict[schema.Path, str],
    problems: list[Problem],
) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            where = (*path, key.value)
            if key.value in seen:
                problems.append(Problem(where, "this key appears twice"))
            seen.add(key.value)
            lines[where] = f"{name}:{key.start_mark.line + 1}"
            _mark(value, where, name, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = f"{name}:{value.start_mark.line + 1}"
            _mark(value, (*path, i), name, lines, problems)


def _override(tree: dict[str, Any], override: str, lines: dict[schema.Path, str]) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(
            [Problem((), f"override {override!r} is not of the form section.key=value")]
        )
    node: Any = tree
    *parents, last = keys = [int(k) if k.isdigit() else k for k in name.split(".")]
    try:
        for key in parents:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[last] = _value(override, value)
    except (TypeError, IndexError, KeyError):
        raise ConfigError(
            [
                Problem(
                    tuple(keys),
                    f"override {override!r} leads through something that is not a mapping",
                )
            ]
        ) from None
    lines[tuple(keys)] = f"override {override!r}"


def _value(override: str, text: str) -> Any:
    """The YAML value that an override gives."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None) or str(error)
        advice = "quote text that holds signs of YAML: key='\"[1\"'"
        raise ConfigError(
            [
                Problem(
                    (), f"override {override!r}: {text!r} is not a YAML value ({reason}); {advice}"
                )
            ]
        ) from None
