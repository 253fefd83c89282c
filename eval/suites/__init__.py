"""Suites: named lists of evaluation sets, each with its task, its main score and its place.

A suite is a YAML file beside this one (`vlp eval MODEL --suite datacomp --data ROOT`), or any file
with the key `sets`:

    title: DataComp                                     what tables call it
    source: https://…                                   whose list it is
    at: ["wds_{name}"]                                  places under ROOT, tried in their order
    get: "https://huggingface.co/datasets/…/{name}"     where sets come from
    task: zeroshot                                      of sets that name none
    sets:
      pets: {wds: vtab/pets, main: mean_per_class_recall}

`{name}` is the set's `wds`, its name in clip_benchmark, with "-" for "/". Class names and templates
of such a set lie beside its shards.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlp.config import read_yaml
from vlp.plugin import Plugin, keyed
from vlp.schema import ConfigError, Problem, did_you_mean, parse_into

ALL_LOCAL = "all-local"  # every set of every suite that lies under ROOT
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Layout:
    """Another form of a set, such as its authors' archive."""

    at: list[str]  # places under ROOT, tried in their order
    files: dict[str, list[str]] = field(default_factory=dict)  # options that are places too
    options: dict[str, Any] = field(default_factory=dict)  # of the task, for this form alone


@dataclass(frozen=True)
class Entry:
    """One set of a suite."""

    name: str = ""  # its key
    wds: str = ""  # its name in clip_benchmark; "": the set has a layout of its own
    task: str = ""  # of vlp.eval.tasks; "": the suite's
    options: dict[str, Any] = field(default_factory=dict)  # of the task, beside `data`
    main: str | list[str] = ""  # the score that counts, or several: their mean; "": the suite's
    at: list[str] = field(default_factory=list)  # places under ROOT; empty: the suite's
    # options that are places too, such as `images`; a set without them is absent
    files: dict[str, list[str]] = field(default_factory=dict)
    also: list[Layout] = field(default_factory=list)  # other forms, tried after this one
    get: str = ""  # where it comes from; "": the suite's

    @property
    def scores(self) -> list[str]:
        """The scores whose mean is the main score; empty: the task's MAIN."""
        several = [self.main] if isinstance(self.main, str) else self.main
        return [score for score in several if score]

    @property
    def layouts(self) -> list[Layout]:
        """Every form in which the set is known, in the order in which they are looked for."""
        return [Layout(self.at, self.files), *self.also]

    def plugin(self, places: dict[str, Any]) -> Plugin:
        """The set as a task under its name; ConfigError for options that the task does not know.

        places: `data`, the other options that are places, and those of the form that is there.
        """
        options = {**self.options, **places}
        (task,) = keyed("vlp.eval.tasks", {self.task: options})
        return replace(task, label=self.name)


@dataclass(frozen=True)
class Suite:
    """A named list of sets; their average is the mean of their main scores."""

    title: str
    sets: dict[str, Entry]
    source: str = ""
    task: str = "zeroshot"
    main: str | list[str] = ""
    at: list[str] = field(default_factory=list)
    get: str = ""

    @property
    def entries(self) -> list[Entry]:
        return list(self.sets.values())


def names() -> list[str]:
    """The suites that have a file here, and the one of all."""
    return [*sorted(path.stem for path in FOLDER.glob("*.yaml")), ALL_LOCAL]


def is_suite(reference: str) -> bool:
    """Whether --suite names a suite or a file of one, rather than a file of tasks; ValueError for
    what is neither.
    """
    if reference in names():
        return True

    path = Path(reference)
    if not path.is_file():
        raise ValueError(f"no suite or file {reference!r}{did_you_mean(reference, names())}")
    content, _ = read_yaml(path.read_text(encoding="utf-8"), reference)
    return "sets" in content


def read(reference: str) -> Suite:
    """A suite by its name, or from a file; ConfigError says what is wrong with it."""
    if reference == ALL_LOCAL:
        return _all()
    path = FOLDER / f"{reference}.yaml"
    if reference not in names():
        path = Path(reference)
    return _read(path)


def _read(path: Path) -> Suite:
    content, lines = read_yaml(path.read_text(encoding="utf-8"), path.name)
    problems: list[Problem] = []
    suite = parse_into(Suite, content, (), problems)
    if problems:
        raise ConfigError(problems, lines)
    return replace(suite, sets={name: _filled(suite, name, e) for name, e in suite.sets.items()})


def _filled(suite: Suite, name: str, entry: Entry) -> Entry:
    """The entry with what it takes from its suite."""
    folder = (entry.wds or name).replace("/", "-")
    return replace(
        entry,
        name=name,
        task=entry.task or suite.task,
        main=entry.main or suite.main,
        at=[place.replace("{name}", folder) for place in entry.at or suite.at],
        get=(entry.get or suite.get).replace("{name}", folder),
    )


def _all() -> Suite:
    """Every set of every suite. Of a set that several list, the first suite's main score counts."""
    sets: dict[str, Entry] = {}
    for name in names()[:-1]:
        for entry in _read(FOLDER / f"{name}.yaml").entries:
            sets.setdefault(entry.name, entry)
    return Suite("All sets here", sets)
