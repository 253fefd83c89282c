"""`vlp report`: one self-contained HTML file about a run, or about two side by side.

    runs.py       what a run's folder holds, complete or not
    look.py       the newest checkpoint on a bounded sample of the run's evaluation sets
    evidence.py   what it showed, as values, and notes on what could not be had
    findings.py   what embeddings show: projection, confusions, rankings, choices (pure)
    arms.py       several runs' scores side by side (--compare), and scaling.py where they differ in
                  samples seen
    numbers.py, curves.py, certain.py, pictures.py, settings.py    the page's sections
    charts.py, planes.py, logarithms.py, markup.py, style.css, page.js    how they are drawn

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
  vlp report runs/demo --against runs/base
      (the page of runs/demo; curves, scores and configuration beside the other's)
  vlp report runs/a runs/b
      (both alike, with pictures from both models)
  vlp report --compare runs/infonce runs/siglip cua=runs/seeds_of_cua
      (all that they were evaluated in, with distances from the first)
  vlp report --compare short=runs/1ep longer=runs/3ep longest=runs/9ep --to scaling.html
      (beside it errors over samples seen, with a power law from four runs on)
"""
SAMPLES = 400


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    run_help = "a run's folder; it may still be going, or have crashed"
    add("run_folder", nargs="?", metavar="RUN", help=run_help)
    other_help = "a second run, shown in full beside the first"
    add("other", nargs="?", metavar="OTHER", help=other_help)
    against_help = "a run to hold RUN against: its curves, scores and configuration only"
    add("--against", metavar="OTHER", help=against_help)

    compare_help = "runs, folders of runs that differ in their seed, or files of vlp eval --out: "
    compare_help += "their scores side by side, each with its distance from the first's"
    add("--compare", nargs="+", metavar="ARM", help=compare_help)

    to_help = "file to write (default: RUN/report.html; for two runs RUN/report-OTHER.html; with "
    to_help += "--compare a table on the console alone)"
    add("--to", metavar="FILE", help=to_help)
    data_help = "more shards with negatives, for examples"
    add("--data", nargs="+", default=[], metavar="PATH", help=data_help)
    samples_help = "at most so many of a set (default: %(default)s)"
    add("--samples", type=int, default=SAMPLES, metavar="N", help=samples_help)
    no_model_help = "only what the run wrote down; no model is loaded"
    add("--no-model", action="store_true", help=no_model_help)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Wrong input is a ValueError that helps."""
    if options.compare:
        return _compare(options)
    if options.run_folder is None:
        raise ValueError("give RUN, or --compare with several; see vlp report --help")
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


def _compare(options: argparse.Namespace) -> int:
    """Print the arms side by side, and write the page where --to asks for it."""
    from vlp.eval.report import arms

    if options.run_folder is not None or options.against:
        raise ValueError("--compare names all arms itself; leave out RUN, OTHER and --against")
    target = None if options.to is None else Path(options.to)
    _refuse_folder(target)

    compared = arms.read(options.compare)
    scores = arms.compare(compared)
    print(arms.text(scores))
    if target is not None:
        written = _save(target, arms.page(compared, scores))
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

    shown_runs = [runs.read(Path(place)) for place in (folder, other) if place is not None]
    if len(shown_runs) > 1:
        runs.tell_apart(*shown_runs)

    # A target that cannot be written is refused before a model is loaded.
    target = Path(to) if to is not None else _default(shown_runs)
    _refuse_folder(target)

    # With --against only the first run's model is looked at.
    evidence: list[Evidence | None] = [None] * len(shown_runs)
    if with_model:
        looked_at = shown_runs if both else shown_runs[:1]
        evidence[: len(looked_at)] = _look(looked_at, data or [], samples)
    return _save(target, _page(shown_runs, evidence, with_model))


def _refuse_folder(target: Path | None) -> None:
    """Raise ValueError where a page would take the place of a folder."""
    if target is not None and target.is_dir():
        raise ValueError(
            f"--to {target} is a folder; name a file, such as {target / 'report.html'}"
        )


def _default(runs: list[Run]) -> Path:
    """Where the page lies unless --to says otherwise."""
    name = "report.html" if len(runs) == 1 else f"report-{runs[1].folder.resolve().name}.html"
    return runs[0].folder / name


def _look(runs: list[Run], data: list[str], samples: int) -> list[Evidence]:
    """What the models show, two of them on the same sets with negatives."""
    from vlp.eval.report import look

    # Sets that lie in one run's folder are scored for both models.
    sets = []
    for run in runs:
        sets += look.beside(run)
    return [look.look(run, [*sets, *data], samples) for run in runs]


def _page(runs: list[Run], evidence: list[Evidence | None], with_model: bool) -> str:
    """The document, its sections in the order of reading."""
    from vlp.eval.report import certain, curves, markup, numbers, pictures, settings

    final = [(run.name, list(numbers.records_of(run).values())) for run in runs]
    sections = [
        numbers.summary(runs, evidence),
        curves.curves(runs),
        curves.scores(runs),
        certain.certainty(final, curves.legend(runs)),
        pictures.space(runs, evidence, with_model),
        pictures.confusion(runs, evidence, with_model),
        pictures.retrieval(runs, evidence, with_model),
        pictures.ask(runs, evidence, with_model),
        pictures.examples(runs, evidence, with_model),
        settings.configuration(runs),
        settings.environment(runs),
    ]
    shown = [section for section in sections if section is not None]
    return markup.page(" and ".join(run.name for run in runs), shown)


def _save(target: Path, text: str) -> Path:
    """Write the page whole or not at all."""
    from vlp.files import write_atomically

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, text.encode())
    return target
