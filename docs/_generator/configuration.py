"""The page of every configuration key, and tables of the keys of one section.

A section has `name`, `summary` and `keys`; a key has `name`, `type`, `default` ("" where it is
required) and `sentence`.
"""

from __future__ import annotations

from typing import Any

from _generator.text import escaped, table

INTRODUCTION = """# Configuration

Every key of a run's YAML file. `vlp config` prints the same in the terminal. Each key can be set on
the command line as well: `train.batch=512`. A duration is a number of steps (`1000`), a share of
the run (`5%`), epochs (`3ep`) or samples (`200ksamples`, `2Msamples`).
"""


def page(sections: list[Any]) -> str:
    parts = [INTRODUCTION]
    for section in sections:
        parts.append(f"## {section.name or 'The run'}")
        parts.append(escaped(section.summary))
        parts.append(keys(section))
    return "\n\n".join(parts) + "\n"


def keys(section: Any) -> str:
    """The keys of a section as a table; a sentence where it has none."""
    if not section.keys:
        return "It has no keys of its own."

    rows = []
    for key in section.keys:
        default = f"`{key.default}`" if str(key.default) else "required"
        # Types and defaults hold signs that Markdown would read, so they are code.
        rows.append([f"`{key.name}`", f"`{key.type}`", default, escaped(key.sentence)])
    return table(["key", "type", "default", "meaning"], rows)
