"""Prompts for the sets of a suite from files: `--prompts PATH`.

A folder holds SET.json or SET.txt; a JSON file holds {set: templates}, as clip_benchmark's
--custom_template_file. Templates are a list, or {class name: [sentences]} as CuPL publishes them.
SET is the set's name in the suite. Sets without a file keep the prompts beside their pictures.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlp.eval import prompts
from vlp.eval.suites import Entry
from vlp.plugin import load
from vlp.schema import did_you_mean


def with_prompts(entries: list[Entry], place: str) -> list[Entry]:
    """The sets with what the files say for them; ValueError for files of no set, and for wrong
    ones.
    """
    prompted = {entry.name for entry in entries if _takes_templates(entry)}
    chosen = _chosen(Path(place).expanduser())
    unknown = [name for name in chosen if name not in prompted]
    if unknown:
        raise ValueError(
            f"--prompts {place} has prompts for {unknown[0]!r}, which is no set with prompts here"
            f"{did_you_mean(unknown[0], prompted)}"
        )

    result = []
    for entry in entries:
        if entry.name in chosen:
            entry = replace(entry, options={**entry.options, "templates": chosen[entry.name]})
        result.append(entry)
    return result


def _takes_templates(entry: Entry) -> bool:
    """Whether the set's task prompts with templates."""
    options = load("vlp.eval.tasks", entry.task).Options
    return "templates" in {key.name for key in fields(options)}


def _chosen(path: Path) -> dict[str, Any]:
    """Set -> its templates, read and checked."""
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.txt")])
        chosen = {file.stem: prompts.templates(str(file)) for file in files}
    else:
        chosen = {name: prompts.templates(value) for name, value in _mapping(path).items()}
    if not chosen:
        raise ValueError(f"--prompts {path} holds no SET.json and no SET.txt")
    return chosen


def _mapping(path: Path) -> dict[str, Any]:
    """The content of a JSON file of several sets."""
    value = prompts.read_json(path)
    if not isinstance(value, dict) or any(isinstance(v, str) for v in value.values()):
        raise ValueError(f"--prompts {path}: expected {{set: templates}}, or a folder of SET.json")
    return value
