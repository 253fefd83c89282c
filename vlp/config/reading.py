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

    # What stands there instead of a secret would be taken for the secret.
    hidden = list(privacy.hidden_keys(tree))
    if hidden:
        again = " ".join(f"{key}=…" for key in hidden)
        raise _refusal(
            f"{path} leaves out secrets, which no run writes down; give them again ({again}), "
            "or use the configuration that the run was started with"
        )
    return parse(tree, lines)


def recorded(path: str | Path) -> Config:
    """The configuration that `dump` wrote, for what it says besides its secrets."""
    return parse(*_read(Path(path), []))


def _read(path: Path, overrides: list[str]) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """A YAML file with overrides applied, and where each of its values stands."""
    tree, lines = read_yaml(_text_of(path), str(path))

    # Overrides before validation: they may supply what the file lacks.
    for override in overrides:
        _override(tree, override, lines)

    # Before anything is said of these values, so that no message shows a secret among them.
    privacy.remember(tree)
    return tree, lines


def _text_of(path: Path) -> str:
    """The file's text; ConfigError says what is there instead."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [*shipped(), *map(str, path.parent.glob("[!.]*.y*ml"))]
        suggestion = did_you_mean(str(path), known)
        raise _refusal(f"no configuration file {path}{suggestion}") from None
    except IsADirectoryError:
        files = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))) or "none"
        raise _refusal(f"{path} is a folder; name a YAML file (in it: {files})") from None
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise _refusal(f"{path} is no text in UTF-8 ({place})") from None


def _refusal(message: str) -> ConfigError:
    """The error for what is wrong with the whole, at no key of it."""
    return ConfigError([Problem((), message)])


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
    path = Path(name)
    if path.is_file():
        return path
    return shipped().get(name.removesuffix(".yaml"), path)


def read_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[schema.Path, str]]:
    """Parse YAML into plain values and a map from each value's path to "file:line"; duplicate keys
    are an error.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _refusal(f"{name}: not valid YAML: {error}") from None
    # A thousand brackets are YAML, and deeper than its reader goes.
    except RecursionError:
        raise _refusal(f"{name}: values are nested too deep; expected a configuration") from None
    if not isinstance(values, dict):
        raise _refusal(
            f"{name}: found {type(values).__name__}, expected a mapping of keys to values"
        )

    # Plain values know neither their lines nor that a key stood there twice; the nodes do.
    assert root is not None  # a mapping has nodes
    lines: dict[schema.Path, str] = {(): name}
    problems: list[Problem] = []
    try:
        _mark(root, (), name, lines, problems)
    except RecursionError:
        raise _refusal(f"{name}: an alias (*name) stands inside of what it names") from None
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
    """Add the lines of a node and of all below it to `lines`, and doubled keys to `problems`."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            key_path = (*path, key.value)
            if key.value in seen:
                problems.append(Problem(key_path, "this key appears twice"))
            seen.add(key.value)
            lines[key_path] = f"{name}:{key.start_mark.line + 1}"
            _mark(value, key_path, name, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = f"{name}:{value.start_mark.line + 1}"
            _mark(value, (*path, i), name, lines, problems)


def _override(tree: dict[str, Any], override: str, lines: dict[schema.Path, str]) -> None:
    """Set the value that `section.key=value` names; sections that are missing are made."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise _refusal(f"override {override!r} is not of the form section.key=value")

    # Numbers are places in lists: data.sources.0.path.
    keys = [int(key) if key.isdigit() else key for key in name.split(".")]
    node: Any = tree
    try:
        for key in keys[:-1]:
            # `train:` with nothing behind it is null, and may get keys all the same.
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[keys[-1]] = _value(override, text)
    except (TypeError, IndexError, KeyError):
        message = f"override {override!r} leads through something that is not a mapping"
        raise ConfigError([Problem(tuple(keys), message)]) from None
    lines[tuple(keys)] = f"override {override!r}"


def _value(override: str, text: str) -> Any:
    """The YAML value that an override gives."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or str(error)
        advice = "quote text that holds signs of YAML: key='\"[1\"'"
        raise _refusal(
            f"override {override!r}: {text!r} is not a YAML value ({reason}); {advice}"
        ) from None
