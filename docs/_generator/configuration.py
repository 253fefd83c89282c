"""The page of every configuration key, and tables of the keys of one section.

Sections and keys are those of vlp.config.reference: a section has `name`, `sentence` and `keys`; a
key has `key` (dotted), `type`, `default` ("" for a section of its own) and `sentence`.
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
        parts.append(escaped(section.sentence))
        parts.append(keys(section))
    return "\n\n".join(parts) + "\n"


def keys(section: Any) -> str:
    """The keys of a section as a table; a sentence where it has none."""
    if not section.keys:
        return "It has no keys of its own."

    rows = []
    for key in section.keys:
        # Types and defaults hold signs that Markdown would read, so they are code.
        shown = key.default or "its own keys"
        default = shown if shown in ("required", "its own keys") else f"`{shown}`"
        rows.append([f"`{key.key}`", f"`{key.type}`", default, escaped(key.sentence)])

    return table(["key", "type", "default", "meaning"], rows)
