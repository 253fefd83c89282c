"""`vlp eval MODEL --suite NAME --data ROOT`: what is asked for, checked, and what is told of it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.eval.suites import ALL_LOCAL, Suite, is_suite, names, read

if TYPE_CHECKING:
    from torch import Tensor

    from vlp.eval.suites.places import Located
    from vlp.eval.suites.summary import Summary


@dataclass(frozen=True)
class Asked:
    """A suite, and which of its sets are there."""

    suite: Suite
    located: Located
    lists_absent: bool = True  # not where sets are taken as they are found


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    suite_help = (
        f"published sets under --data ROOT (a folder or hf://USER): {', '.join(names())}; or YAML: "
        "several tasks with their options, as in a config's eval section"
    )
    add("--suite", metavar="NAME", help=suite_help)
    missing_help = "of --suite NAME: refuse absent sets, or go on with the rest (default error)"
    add("--missing", choices=("error", "skip"), help=missing_help)
    prompts_help = (
        "of --suite NAME: a folder of SET.json or SET.txt, or a JSON file {set: templates}"
    )
    add("--prompts", metavar="PATH", help=prompts_help)
    add("--html", metavar="FILE", help="of --suite NAME: write the results as one page")


def asked_for(options: argparse.Namespace) -> Asked | None:
    """The suite of sets that the options ask for, with its sets located; None for other
    evaluations. ValueError for options that do not go together, and for absent sets.
    """
    if options.suite and options.task:
        raise ValueError("--suite names the tasks itself; leave out --task")
    if not options.suite or not is_suite(options.suite):
        belonging = {
            "--missing": options.missing,
            "--prompts": options.prompts,
            "--html": options.html,
        }
        stray = [name for name, value in belonging.items() if value is not None]
        if stray:
            raise ValueError(
                f"{stray[0]} belongs to --suite NAME, one of {', '.join(names())}; leave it out"
            )
        return None
    _check(options)

    from vlp.eval.suites.places import list_absent, locate
    from vlp.eval.suites.templates import with_prompts

    suite = read(options.suite)
    entries = suite.entries
    if options.prompts:
        entries = with_prompts(entries, options.prompts)
    located = locate(entries, options.data)
    roots = " or ".join(options.data)
    n_absent, n_sets = len(located.absent), len(suite.entries)
    if not located.entries:
        raise ValueError(
            f"none of the {n_sets} sets of {options.suite} is under {roots}:\n"
            f"{list_absent(located.absent)}"
        )

    # What is absent is known before anything long starts; `all-local` means what there is.
    may_skip = options.missing == "skip" or options.suite == ALL_LOCAL
    if located.absent and not may_skip:
        raise ValueError(
            f"{n_absent} of the {n_sets} sets of {options.suite} are not under {roots}:\n"
            f"{list_absent(located.absent)}\nfetch them, or pass --missing skip to go on with the "
            f"{len(located.entries)} others (the average is then not comparable)"
        )
    _check_scores(located)
    # Where the page cannot be written, hours of work would have nowhere to go.
    if options.html:
        Path(options.html).parent.mkdir(parents=True, exist_ok=True)
    return Asked(suite, located, options.suite != ALL_LOCAL)


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go with a suite."""
    if not options.data:
        raise ValueError(
            f"--suite {options.suite} needs --data ROOT: the folder that holds its sets, or hf://USER"
        )
    pairs = [part for part in options.data if "=" in part and not Path(part).exists()]
    if pairs:
        raise ValueError(
            f"found --data … {pairs[0]}; expected folders or hf://USER alone: options of single "
            "sets stand in a suite's file"
        )
    if options.html and Path(options.html).is_dir():
        raise ValueError(f"--html {options.html} is a folder; name a file, such as results.html")
    if options.out and options.out.endswith("/"):
        raise ValueError(
            f"--out {options.out} is a folder, which has no place for the suite's average; name a "
            "file, such as results.json"
        )
    if options.html and options.blend:
        raise ValueError("--html shows one model's results; leave it out, or give MODEL")


def _check_scores(located: Located) -> None:
    """Raise ValueError for a main score that the task of its set does not give."""
    from vlp import watch

    # Hours later such a set would be missing from the average.
    for entry, task in zip(located.entries, located.tasks, strict=True):
        for score in entry.scores or [task.module.MAIN]:
            others = watch.unlisted(task, score)
            if others:
                raise ValueError(
                    f"set {entry.name!r}: its main score is {score!r}, and {task.name} gives "
                    f"{', '.join(others)}; name one of these as main: in the suite's file"
                )


def summary_of(asked: Asked, records: list[dict[str, Any]], items: dict[str, Tensor]) -> Summary:
    """What a model's results on the sets come to. items: "label/score" -> [U, 2]."""
    from vlp.eval.suites.summary import summarise

    return summarise(asked.suite.title, asked.suite.source, asked.located, records, items)


def notes(asked: Asked | None, records: list[dict[str, Any]]) -> list[str]:
    """What makes results not comparable, line by line: of a suite also the sets that are absent."""
    from vlp.eval.report.records import not_comparable
    from vlp.eval.suites.places import list_absent

    lines = not_comparable(records)
    if asked is not None and asked.located.absent and asked.lists_absent:
        lines.append(f"absent:\n{list_absent(asked.located.absent)}")
    return lines


def tell(
    asked: Asked,
    records: list[dict[str, Any]],
    items: dict[str, Tensor],
    options: argparse.Namespace,
) -> None:
    """Print the table, and write the results and the page that are asked for."""
    from vlp.eval.report.records import put
    from vlp.eval.suites.page import page
    from vlp.eval.suites.summary import table
    from vlp.files import write_atomically

    summary = summary_of(asked, records, items)
    print("\n".join([table(summary), *notes(asked, records)]))

    if options.out:
        put(options.out, records, items, summary.plain())
    if options.html:
        text = page(summary, records[0]["model"], records)
        write_atomically(Path(options.html), text.encode(errors="replace"))
        print(f"written: {options.html}")
