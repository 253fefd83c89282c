"""Compare with the libraries: one table, and an exit code of 1 where a figure differs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.eval import material
from tests.eval.parity import KEPT, PARTS, guide, inputs
from tests.eval.parity.compare import (
    BOUND,
    Declared,
    Figures,
    differences,
    shown,
    thinned,
)


@dataclass
class Outcome:
    """What a library and this project say, figure by figure."""

    peer: str
    version: str
    theirs: Figures
    ours: Figures
    declared: list[Declared] = field(default_factory=list)

    @property
    def apart(self) -> dict[str, float]:
        return differences(self.theirs, self.ours)


def main(arguments: Iterable[str] | None = None) -> int:
    """The exit code: see `report`."""
    parser = argparse.ArgumentParser(prog="python -m tests.eval.parity", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    help_of_write = "keep what the libraries say, for the tests and the guide"
    parser.add_argument("--write", action="store_true", help=help_of_write)
    options = parser.parse_args(arguments)

    if not material.DATA.exists():
        parser.error(f"{material.DATA} is not there; set VLP_DATA to the folder with the real data")

    # The libraries would take a GPU where there is one, and it rounds in another way.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs.build(root)
        outcomes, obstacles = compare(options.only, root)

    code = report(outcomes, obstacles)
    if options.write and code == 0:
        write(outcomes)
    return code


def report(outcomes: dict[str, Outcome], obstacles: dict[str, str]) -> int:
    """Print what was found. 0: all figures agree; 1: some differ; 2: some were not compared."""
    for name, outcome in outcomes.items():
        print_part(name, outcome)

    every_difference = list(chain.from_iterable(o.apart.values() for o in outcomes.values()))
    n_differing = sum(apart > BOUND for apart in every_difference)
    n_figures = len(every_difference)
    print(f"\n{n_figures} figures, of which {n_differing} differ by more than {BOUND:g}")
    for name, obstacle in obstacles.items():
        print(f"{name}: not compared; {obstacle}")

    if n_differing:
        return 1
    return 2 if obstacles else 0


def compare(names: Iterable[str], root: Path) -> tuple[dict[str, Outcome], dict[str, str]]:
    """The outcomes of the parts, and why others cannot run here."""
    outcomes, obstacles = {}, {}
    for name in names:
        part = PARTS[name]
        obstacle = obstacle_of(part)
        if obstacle is None:
            declared = part.declared(root) if hasattr(part, "declared") else []
            outcomes[name] = Outcome(
                part.PEER, version(part.PEER), part.theirs(root), part.ours(root), declared
            )
        else:
            obstacles[name] = f"{part.PEER}: {obstacle}"
    return outcomes, obstacles


def obstacle_of(part: ModuleType) -> str | None:
    """Why the code of a part's peer cannot run here; None: it can."""
    return part.obstacle() if hasattr(part, "obstacle") else None


def print_part(name: str, outcome: Outcome) -> None:
    """A line a figure, and the differences on purpose behind them."""
    print(f"\n{name} ({outcome.peer} {outcome.version})")
    for figure, apart in outcome.apart.items():
        theirs, ours = (
            shown(figures[figure]) if figure in figures else "-"
            for figures in (outcome.theirs, outcome.ours)
        )
        mark = "  DIFFERS" if apart > BOUND else ""
        print(f"  {figure:<72} {theirs:>26} {ours:>26} {apart:9.1e}{mark}")
    for declared in outcome.declared:
        print(f"  on purpose: {declared.name}: {declared.theirs:g} there, {declared.ours:g} here;")
        print(f"      {declared.reason}")


def write(outcomes: dict[str, Outcome]) -> None:
    """Keep the libraries' numbers, and write the guide's tables from them."""
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name, outcome in outcomes.items():
        kept[name] = {
            "peer": outcome.peer,
            "version": outcome.version,
            "largest_difference": float(f"{max(outcome.apart.values()):.0e}"),
            "figures": {figure: thinned(value) for figure, value in outcome.theirs.items()},
            "declared": [asdict(declared) for declared in outcome.declared],
        }

    # In the order of the parts, of which one may have been measured alone.
    ordered = {name: kept[name] for name in PARTS if name in kept}
    KEPT.write_text(guide.compact(ordered))
    guide.write(ordered)


if __name__ == "__main__":
    sys.exit(main())
