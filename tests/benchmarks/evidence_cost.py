"""What the evidence costs: CPU seconds of each arm's runs, as published, and of those to come."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks import report
from tests.benchmarks.evidence_arms import Table

Run = tuple[str, int]  # arm and seed


def published(tables: Mapping[str, Table], folder: Path | None = None) -> dict[str, float]:
    """CPU seconds of one run of each arm that a published table has, its evaluation included."""
    costs: dict[str, float] = {}
    for name, table in tables.items():
        path = (folder or report.RESULTS.parent / "results") / f"{name}.json"
        if not path.exists():
            continue
        rows = {row["arm"]: row for row in json.loads(path.read_text())["rows"]}
        for arm, title in table.arms.items():
            if title in rows:
                costs.setdefault(arm, rows[title]["CPU s"])
    return costs


def outlook(runs: Sequence[Run], finished: Mapping[Run, float], known: Mapping[str, float]) -> str:
    """How many of these runs have finished, and the CPU hours that the others are expected to take.

    finished: CPU seconds of runs that have. known: of one run of an arm, as published. Arms that
    are in neither are taken as the mean of the others.
    """
    costs = dict(known)
    for arm in {arm for arm, _ in finished}:
        costs[arm] = statistics.mean(cost for (of, _), cost in finished.items() if of == arm)

    missing = [run for run in runs if run not in finished]
    told = f"{len(runs) - len(missing)} of {len(runs)} runs have finished"
    if not missing:
        return told
    if not costs:
        return f"{told}, {len(missing)} are missing; what a run costs is not known"

    middle = statistics.mean(costs.values())
    hours = sum(costs.get(arm, middle) for arm, _ in missing) / 3600
    told += f", {len(missing)} are missing: about {hours:.1f} CPU hours"
    n_guessed = sum(arm not in costs for arm, _ in missing)
    if n_guessed:
        told += f", {n_guessed} runs of unknown cost taken as {middle:.0f} s each"
    return told
