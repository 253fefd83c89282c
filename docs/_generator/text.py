"""From docstrings to Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable

LABELS = ("Relations", "Papers", "Needs", "Cost", "Use")  # that open a part of a loss's docstring


def paragraphs(documented: object) -> list[str]:
    """The paragraphs of a docstring, without its indentation."""
    return re.split(r"\n\s*\n", inspect.getdoc(documented) or "")


def markdown(documented: object) -> str:
    """A docstring as Markdown: prose stays prose, and what spaces lay out keeps its layout."""
    parts = []
    for part in paragraphs(documented):
        label, _, rest = part.partition(":")
        if label in LABELS:
            parts.append(f"**{label}**\n\n{escaped(rest.strip())}")
            continue

        # Formulae and lists of names stand on indented lines, or in columns of several spaces.
        laid_out = re.search(r"^ {2,}|\S {3,}\S|^L = ", part, re.MULTILINE)
        fenced = f"```text\n{textwrap.dedent(part)}\n```"
        parts.append(fenced if laid_out else escaped(part))

    return "\n\n".join(parts)


def escaped(prose: str) -> str:
    """Prose with the signs escaped that Markdown would read; code spans stay as they are."""
    written = []
    for span in re.split(r"(`[^`]*`)", prose):
        # A backslash inside a code span would be shown.
        is_code = span.startswith("`")
        written.append(span if is_code else re.sub(r"([*<\[\]])", r"\\\1", span))

    return "".join(written)


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(columns)

    # A cell of several lines would end the table.
    lines = [names, ["---"] * len(names), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: str) -> str:
    """A text on one line; a bar inside of it would end the cell."""
    return " ".join(value.split()).replace("|", "\\|")
