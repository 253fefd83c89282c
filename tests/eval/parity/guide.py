"""The tables of docs/parity.md, from the numbers that are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[3] / "docs" / "parity.md"
BEGIN, END = "<!-- tables: python -m tests.eval.parity --write -->", "<!-- end of tables -->"

Kept = Mapping[str, Mapping[str, Any]]


def tables(kept: Kept) -> str:
    """Two tables in Markdown: what agrees, and what differs on purpose."""
    lines = ["| library | version | compared | figures | largest difference |"]
    lines.append("|---|---|---|---|---|")
    for name, part in kept.items():
        _, _, subject = name.partition(": ")
        apart = f"{part['largest_difference']:g}"
        cells = (part["peer"], part["version"], subject or "scores", len(part["figures"]), apart)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    n_figures = sum(len(part["figures"]) for part in kept.values())
    lines.append(f"| all | | | {n_figures} | |")

    lines += ["", "| differs on purpose | there | here | why |", "|---|---|---|---|"]
    for part in kept.values():
        for declared in part["declared"]:
            numbers = f"{declared['theirs']:g} | {declared['ours']:g}"
            name = declared["name"].replace("<", "&lt;")
            lines.append(f"| {part['peer']}: {name} | {numbers} | {declared['reason']} |")
    return "\n".join(lines)


def between_marks(page: str) -> str:
    """What the page has between the marks."""
    return page.split(BEGIN)[1].split(END)[0].strip()


def write(kept: Kept) -> None:
    """Put the tables between the marks of the page."""
    page = PAGE.read_text()
    PAGE.write_text(page.replace(between_marks(page), tables(kept)))


def compact(kept: Kept) -> str:
    """JSON with an array on one line."""
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    arrays = re.compile(r"\[\s+([-+.\de,\s]+?)\s+\]")
    return arrays.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"
