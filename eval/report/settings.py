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
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from vlp.eval.report.markup import Html, more, note, section, table, tag
from vlp.eval.report.numbers import tagged
from vlp.eval.report.runs import Run
from vlp.privacy import private, shareable, without_secrets

UNIMPORTANT = ("out", "resume")  # of course they differ


# --- configuration --------------------------------------------------------------------------------


def configuration(runs: list[Run]) -> Html:
    """What differs between two runs, and the first run's settings by section."""
    settings = [dict(flattened(run)) for run in runs]
    blocks: list[Any] = []
    if len(runs) > 1:
        blocks += [tag("h3", "Differences"), _differences(runs, settings)]
    if not settings[0]:
        missing = note("No configuration could be read.")
        return section("configuration", "Configuration", blocks, missing)

    # train.batch stands under train, seed under run.
    groups: dict[str, list[tuple[str, str]]] = {}
    for key, value in settings[0].items():
        head, _, rest = key.partition(".")
        group, name = (head, rest) if rest else ("run", key)
        groups.setdefault(group, []).append((name, value))

    if len(runs) > 1:
        blocks.append(tag("h3", tagged(runs[0], runs)))
    blocks += [
        more(name, table(["key", "value"], rows, numeric=9)) for name, rows in groups.items()
    ]
    lead = "Resolved, with every default. Paths show their last part."
    return section("configuration", "Configuration", blocks, lead=lead)


def _differences(runs: list[Run], settings: list[dict[str, str]]) -> Html:
    """The settings in which two runs differ, side by side."""
    if not all(settings):
        return note("One of the runs has no readable configuration.")

    first, second = settings
    # A key that one run lacks differs too.
    rows = []
    for key in dict.fromkeys([*first, *second]):
        if first.get(key) != second.get(key) and key not in UNIMPORTANT:
            rows.append([key, first.get(key, "–"), second.get(key, "–")])
    if not rows:
        return note("None: both runs have the same settings.")
    return table(["key", *(tagged(run, runs) for run in runs)], rows, numeric=9)


def flattened(run: Run) -> Iterator[tuple[str, str]]:
    """(dotted key, value as shown) of the configuration, without secrets and foreign folders."""

    def walk(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*keys, str(key)))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            # Sources and plug-ins: a setting for each; a plain list is one setting.
            for i, item in enumerate(value):
                yield from walk(item, (*keys, str(i)))
        else:
            yield ".".join(keys), shown(value, keys[-1] if keys else "", run)

    if run.config:
        yield from walk(without_secrets(run.config), ())


def shown(value: Any, key: str, run: Run) -> str:
    """A setting for other eyes: places inside the run relative to it, other places by their last
    part.
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item, key, run) for item in value) or "none"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    # An address, or a prefix such as pipe: and hf:, is no place on this machine.
    if not isinstance(value, str) or "/" not in value or re.match(r"[\w-]+:", value):
        return private(str(value))

    inside = _inside(value, run)
    if inside is not None:
        return inside
    last = shareable(value, key)
    return private(value) if last == value else f"…/{last}"


def _inside(value: str, run: Run) -> str | None:
    """A place in the run's folder relative to it, the folder by the run's name; else None."""
    # As written in the configuration, as the page's reader calls it, and with links resolved.
    for root in (str(run.config.get("out", "")), str(run.folder), str(run.folder.resolve())):
        if root and Path(value).is_relative_to(root):
            return run.name if Path(value) == Path(root) else str(Path(value).relative_to(root))
    return None


# --- environment ----------------------------------------------------------------------------------


def environment(runs: list[Run]) -> Html:
    """Versions that the runs recorded, and the machine and code that made this page."""
    # Of this machine its kind alone: no name, no folder.
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    here = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{os.cpu_count()} cores, {device}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "vlp": metadata.version("vlp"),
        "commit": commit(),
    }
    this_machine = table(["where this page was made", ""], list(here.items()))
    return section("environment", "Environment", [_versions(runs), this_machine])


def _versions(runs: list[Run]) -> Html:
    """The packages that the runs were trained with, side by side."""
    recorded = [_recorded_versions(run) for run in runs]
    packages = dict.fromkeys(chain.from_iterable(recorded))
    if not packages:
        return note(
            "Versions in training are unknown: no checkpoint and no results.json records them."
        )
    rows = [[name, *(str(versions.get(name, "–")) for versions in recorded)] for name in packages]
    return table(["in training", *(tagged(run, runs) or "version" for run in runs)], rows)


def _recorded_versions(run: Run) -> dict[str, Any]:
    """Package versions of the newest checkpoint, else of the results."""
    if run.state.get("versions"):
        return run.state["versions"]
    return next((record["versions"] for record in run.results if "versions" in record), {})


def commit() -> str:
    """The commit of the code in use, if it is a clone: its own, not that of a folder above an
    installation.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown: vlp is not run from a clone"
    try:
        git = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: git does not answer"
    return git.stdout.strip() or "unknown: git does not know it"
