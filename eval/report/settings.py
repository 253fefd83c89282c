"""The page's sections on what was run: configuration, its differences from another run's,
environment.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vlp.eval.report.markup import Html, more, note, section, table, tag
from vlp.eval.report.numbers import tagged
from vlp.eval.report.runs import Run
from vlp.privacy import private, without_secrets

PLACES = {
    "path",
    "paths",
    "data",
    "images",
    "out",
    "resume",
    "classes",
    "templates",
    "pretrained",
}  # keys that may hold paths
UNIMPORTANT = ("out", "resume")  # of course they differ


def configuration(found: list[Run]) -> Html:
    """What differs between two runs, and the first run's settings by section."""
    flat = [dict(flattened(run)) for run in found]
    blocks: list[Any] = []
    if len(found) > 1:
        blocks += [tag("h3", "Differences"), _differences(found, flat)]
    if not flat[0]:
        return section(
            "configuration", "Configuration", blocks, note("No configuration could be read.")
        )
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in flat[0].items():
        head, dot, rest = key.partition(".")
        groups.setdefault(head if dot else "run", []).append((rest if dot else key, value))
    blocks += [tag("h3", tagged(found[0], found))] if len(found) > 1 else []
    blocks += [
        more(name, table(["key", "value"], rows, numeric=9)) for name, rows in groups.items()
    ]
    return section(
        "configuration",
        "Configuration",
        blocks,
        lead="Resolved, with every default. Paths show their last part.",
    )


def _differences(found: list[Run], flat: list[dict[str, str]]) -> Html:
    if not all(flat):
        return note("One of the runs has no readable configuration.")
    first, second = flat
    keys = [
        k
        for k in dict.fromkeys([*first, *second])
        if first.get(k) != second.get(k) and k not in UNIMPORTANT
    ]
    if not keys:
        return note("None: both runs have the same settings.")
    rows = [[key, first.get(key, "–"), second.get(key, "–")] for key in keys]
    return table(["key", *(tagged(run, found) for run in found)], rows, numeric=9)


def flattened(run: Run) -> Iterator[tuple[str, str]]:
    """(dotted key, value as shown) of the run's configuration, without secrets and foreign folders."""

    def walk(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*keys, str(key)))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                yield from walk(item, (*keys, str(i)))
        else:
            yield ".".join(keys), shown(value, keys[-1] if keys else "", run)

    yield from walk(without_secrets(run.config), ()) if run.config else ()


def shown(value: Any, key: str, run: Run) -> str:
    """A setting for other eyes: places inside the run relative to it, other places by their last
    part.
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item, key, run) for item in value) or "none"
    if (
        isinstance(value, str)
        and key in PLACES
        and "/" in value
        and not re.match(r"[\w-]+:", value)
    ):
        return _place(value, run)
    text = (
        {None: "none", True: "yes", False: "no"}.get(value)
        if value is None or isinstance(value, bool)
        else str(value)
    )
    return private(text)


def _place(value: str, run: Run) -> str:
    for root in (str(run.config.get("out", "")), str(run.folder), str(run.folder.resolve())):
        if root and Path(value).is_relative_to(root):
            return (
                Path(value).relative_to(root).as_posix() if Path(value) != Path(root) else run.name
            )
    return f"…/{Path(value).name}"


def environment(found: list[Run]) -> Html:
    """Versions that the runs recorded, and the machine and code that made this page."""
    blocks = []
    recorded = [
        run.state.get("versions", {})
        or next((r["versions"] for r in run.results if "versions" in r), {})
        for run in found
    ]
    packages = list(dict.fromkeys(name for versions in recorded for name in versions))
    if packages:
        rows = [
            [name, *(str(versions.get(name, "–")) for versions in recorded)] for name in packages
        ]
        blocks.append(
            table(["in training", *(tagged(run, found) or "version" for run in found)], rows)
        )
    else:
        blocks.append(
            note(
                "Versions in training are unknown: no checkpoint and no results.json records them."
            )
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    here = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, {device}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "vlp": metadata.version("vlp"),
        "commit": commit(),
    }
    blocks.append(table(["where this page was made", ""], list(here.items())))
    return section("environment", "Environment", blocks)


def commit() -> str:
    """The commit of the code in use, if it is a clone: its own, not that of a folder above an
    installation.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown: vlp is not run from a clone"
    try:
        done = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: git does not answer"
    return done.stdout.strip() or "unknown: git does not know it"
