"""`vlp report`: one self-contained HTML file about a run, or about two side by side.

    runs.py       what a run's folder holds, complete or not
    model.py      the newest checkpoint on a bounded sample of the run's evaluation sets
    findings.py   what its embeddings show: projection, confusions, rankings, choices (pure)
    numbers.py, pictures.py, settings.py    the page's sections
    charts.py, markup.py, style.css, page.js    how they are drawn

The page needs no network, loads nothing and contains no path beyond the run's own folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.eval.report.evidence import Evidence
    from vlp.eval.report.runs import Run

HELP = "write a page about a run: curves, scores, embeddings, retrieval sheets, configuration"
EXAMPLE = """examples:
  vlp report runs/demo
  vlp report runs/demo --no-model --to demo.html
  vlp report runs/demo --against runs/base      (the page of runs/demo; curves, scores and configuration beside the other's)
  vlp report runs/a runs/b                      (both alike, with pictures from both models)
"""
SAMPLES = 400


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument(
        "run_folder", metavar="RUN", help="a run's folder; it may still be going, or have crashed"
    )
    parser.add_argument(
        "other", nargs="?", metavar="OTHER", help="a second run, shown in full beside the first"
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="a run to hold RUN against: its curves, scores and configuration only",
    )
    parser.add_argument(
        "--to",
        metavar="FILE",
        help="file to write (default: RUN/report.html; for two runs RUN/report-OTHER.html)",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PATH",
        help="more shards with negatives, for examples",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help="at most so many of a set (default: %(default)s)",
    )
    parser.add_argument(
        "--no-model", action="store_true", help="only what the run wrote down; no model is loaded"
    )


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Wrong input is a ValueError with what to do."""
    if options.other and options.against:
        raise ValueError("give the second run either after the first or as --against, not both")
    if options.samples < 5:
        raise ValueError(f"--samples is {options.samples}; expected at least 5")
    written = write(
        options.run_folder,
        options.other or options.against,
        to=options.to,
        with_model=not options.no_model,
        both=options.other is not None,
        data=options.data,
        samples=options.samples,
    )
    print(f"{written} ({written.stat().st_size / 1024:.0f} kB)")
    return 0


def write(
    folder: str | Path,
    other: str | Path | None = None,
    *,
    to: str | Path | None = None,
    with_model: bool = True,
    both: bool = False,
    data: list[str] | None = None,
    samples: int = SAMPLES,
) -> Path:
    """Write the page about the run in `folder`, beside `other` if given; returns the file, written
    whole or not at all.

    `both`: the second run's model is looked at, too. `data`: more sets with negatives. `samples`:
    bound on what is embedded of each set. What a run lacks is said in the page; a folder that is no
    run is a ValueError.
    """
    from vlp.eval.report import runs

    found = [runs.read(Path(f)) for f in (folder, other) if f is not None]
    if len(found) > 1:
        runs.tell_apart(*found)
    target = Path(to) if to is not None else _default(found)
    if target.is_dir():
        raise ValueError(
            f"--to {target} is a folder; name a file, such as {target / 'report.html'}"
        )
    looked_at = found[: 1 + both] if with_model else []
    evidence = _look(looked_at, data or [], samples)
    evidence += [None] * (len(found) - len(evidence))
    return _save(target, _page(found, evidence, with_model))


def _default(found: list[Run]) -> Path:
    name = "report.html" if len(found) == 1 else f"report-{found[1].folder.resolve().name}.html"
    return found[0].folder / name


def _look(looked_at: list[Run], data: list[str], samples: int) -> list[Evidence | None]:
    """What the models show, two of them on the same sets with negatives."""
    from vlp.eval.report import look

    sets = [*(place for run in looked_at for place in look.beside(run)), *data]
    return [look.look(run, sets, samples) for run in looked_at]


def _page(found: list[Run], evidence: list[Evidence | None], with_model: bool) -> str:
    from vlp.eval.report import curves, markup, numbers, pictures, settings

    sections = [
        numbers.summary(found, evidence),
        curves.curves(found),
        curves.scores(found),
        pictures.space(found, evidence, with_model),
        pictures.confusion(found, evidence, with_model),
        pictures.retrieval(found, evidence, with_model),
        pictures.examples(found, evidence, with_model),
        settings.configuration(found),
        settings.environment(found),
    ]
    return markup.page(" and ".join(run.name for run in found), sections)


def _save(target: Path, text: str) -> Path:
    from vlp.eval.pictures import write_atomically

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text.encode())
    return target
