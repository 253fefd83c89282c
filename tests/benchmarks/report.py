"""Benchmark results: one printed table, one JSON file, one marked section of docs/results.md.

A section is what lies between `<!-- name -->` and `<!-- /name -->`; it is replaced, or appended
where there is none.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "results.md"


def publish(name: str, title: str, rows: list[dict[str, Any]], args: Any, notes: str = "") -> None:
    """Print the table; write JSON to `args.json`, or with `args.publish` to docs/results/ and
    docs/results.md.

    rows: one mapping a line with the same keys, the table's columns. notes: sentences under the
    table.
    """
    about = {
        "name": name,
        "command": command(),
        "hardware": hardware(),
        "commit": commit(),
        "notes": notes,
    }
    text = table(rows)

    print(f"\n{title}\n\n{text}\n\n{notes}")
    record = json.dumps({**about, "rows": rows}, indent=1)
    if args.json:
        Path(args.json).write_text(record + "\n")
    if args.publish:
        path = RESULTS.parent / "results" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record + "\n")

        origin = f"`{about['command']}` on {about['hardware']}, commit {about['commit']}."
        body = f"### {title}\n\n{origin}\n\n{text}\n\n{notes}"
        document = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
        RESULTS.write_text(replace_section(document, name, body))


def add_arguments(parser: Any) -> None:
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="write docs/results/ and the section of docs/results.md",
    )


def replace_section(document: str, name: str, body: str) -> str:
    """The document with the section `name` holding `body`."""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{first}\n{body.strip()}\n{last}"
    if first in document and last in document:
        before, rest = document.split(first, 1)
        return before + section + rest.split(last, 1)[1]
    return document.rstrip("\n") + "\n\n" + section + "\n"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of growth: the slope of the logarithms by least squares, NaN of fewer than two
    sizes. What is below a thousandth of its unit counts as that.
    """
    if len(sizes) < 2:
        return math.nan
    logarithms = [math.log(max(value, 1e-3)) for value in values]
    return statistics.linear_regression([math.log(size) for size in sizes], logarithms).slope


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; None is an empty cell, floats get three significant digits."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([cell(row[name]) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def command() -> str:
    """As a reader of the repository would type it: where this machine keeps files is left out."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name

    words = [str(name)]
    before = ""
    for word in sys.argv[1:]:
        is_place = word in ("--out", "--json") or before in ("--out", "--json")
        if word != "--publish" and not is_place:
            words.append(word)
        before = word
    return " ".join(["python", *words])


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({_cpu_name()}), torch {torch.__version__}"


def commit() -> str:
    """Short hash, with + where the tree has changes besides published results; 'unknown' outside a
    clone.
    """
    name = _git("describe", "--always")
    # The second of several tables is written when the first has changed the results.
    others = _git("status", "--porcelain", "--", ".", ":!docs/results", ":!docs/results.md")
    if name is None:
        return "unknown"
    return f"{name}+" if others else name


def _git(*arguments: str) -> str | None:
    """What git prints in this clone; None outside one."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
