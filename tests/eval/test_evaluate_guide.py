"""The guide's table of published sets: every line is a command, and every reader has one."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vlp import plugin
from vlp.eval import prompts, run, suites
from vlp.eval.prompts import translated

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "evaluate.md"
# They read what other tasks read, and have no published set of their own.
OF_ANY_SET = {
    "clip_benchmark_probe", "few_shot", "knn", "linear_probe", "modality_retrieval",
    "modality_zeroshot", "negatives", "representation", "robustness", "tolerance",
}  # fmt: skip
ROW = re.compile(r"\| (?P<set>[^|]+) \| (?P<layout>[^|]+) \| `(?P<line>--task [^|]+)` \|")


def rows() -> list[re.Match[str]]:
    return [match for line in GUIDE.read_text().splitlines() if (match := ROW.fullmatch(line))]


def tasks_of(line: str) -> list[plugin.Plugin]:
    """The line as the command reads it, options checked."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    run.arguments(parser)
    options = parser.parse_args(["MODEL", *shlex.split(line)])
    return plugin.keyed("vlp.eval.tasks", run._tasks(options))


def test_every_line_is_a_command_and_every_reader_has_one():
    known = set(plugin.names("vlp.eval.tasks"))
    in_table = set()
    for row in rows():
        (task,) = tasks_of(row["line"])
        assert task.options.data, row["line"]
        in_table.add(task.label)
    assert in_table == known - OF_ANY_SET and known > OF_ANY_SET
    assert len(rows()) == GUIDE.read_text().count("| `--task ") == 34

    # The others are named by what they ask.
    text = GUIDE.read_text()
    assert [name for name in OF_ANY_SET if f"`{name}`" not in text] == []


@pytest.mark.parametrize("line", ["--task retrieval --data x imagse=y", "--task valze --data x"])
def test_a_line_that_is_none_would_be_found(line):
    with pytest.raises(ValueError, match="did you mean"):
        tasks_of(line)


def test_every_set_of_a_suite_that_has_a_layout_of_its_own_is_in_the_table():
    """By its file or folder in the suite's list, or by its name as the guide writes it."""
    names = "".join(row["set"] for row in rows()).lower().replace("-", "").replace("'", "")
    names = names.replace("++", "pp").replace(" ", "").replace("multilingualcoco", "mscoco")
    missing = []
    n_sets = 0
    for suite in suites.names()[:-1]:
        for entry in suites.read(suite).entries:
            if entry.wds:
                continue
            n_sets += 1
            name = entry.name.replace("_", "").replace("multilingual", "")
            if name not in names:
                missing.append(entry.name)
    assert missing == [] and n_sets == 21


def test_the_translated_sets_that_the_guide_names_are_those_there_are():
    text = GUIDE.read_text()
    for name in [*translated.PHOTO, *translated.IMAGENET]:
        code = name.rpartition("_")[2]
        assert f"`{name}`" in text or f"`_{code}`" in text or f"={name}`" in text, name
    assert "photo_zh" in prompts.sets()
