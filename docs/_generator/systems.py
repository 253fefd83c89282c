"""The page of the field's systems: every published objective and recipe, and how ours differs.

Papers are those of the objectives' docstrings, recipes are the headers of vlp/configs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from _generator.objectives import Objective
from _generator.text import escaped, paragraphs, table
from vlp import configs

RECIPES = Path(configs.__file__).parent
UNCONFIRMED = re.compile(r"could not be confirmed|not confirmed")
FIELD = re.compile(r"#\s{1,2}([a-z]+) {2,}(.*)")  # of a recipe's header: name and its first line

PAGE = """# Systems of the field

What is published and can be run here, by its paper. **As published** means the equation with the
settings shown; where something differs, or could not be confirmed, it is said.

## Objectives

{objectives}

## Recipes

Rows say in which way a recipe is not that of the paper. `vlp train NAME` runs it; its header says
which data it wants.

{recipes}
"""


def page(objectives: list[Objective]) -> str:
    """The text of the page."""
    papers = [paper.row() for objective in objectives for paper in of_objective(objective)]
    # A sum of terms is listed by each of them.
    papers = [list(row) for row in dict.fromkeys(map(tuple, papers))]
    recipes = [row for path in sorted(RECIPES.glob("*.yaml")) if (row := of_recipe(path))]
    return PAGE.format(
        objectives=table(["system", "objective", "here"], papers),
        recipes=table(["recipe", "system", "differs in", "result"], recipes),
    )


@dataclass(frozen=True)
class Paper:
    """One entry of an objective's list of papers."""

    objective: str
    text: str  # on one line

    def row(self) -> list[str]:
        """The system, its configuration, and its state."""
        begin, *rest = re.split(r"`(objective: [^`]+)`", self.text)
        shown = "<br>".join(f"`{text}`" for text in rest[::2])
        link = f"[{self.objective}](objectives/{self.objective}.md)"
        return [linked(escaped(begin.strip(" :,"))), shown or link, self.state(rest[1::2])]

    def state(self, remarks: list[str]) -> str:
        """What the words after the configuration, or a doubt before it, say of the difference."""
        remark = escaped(" ".join(text.strip(" ;,.") for text in remarks).strip())
        if UNCONFIRMED.search(self.text):
            # The doubt stands in the first column where nothing follows the configuration.
            return f"not confirmed: {remark}" if remark else "not confirmed"
        if "`objective: " not in self.text:
            return "related"
        if remark.startswith("with `"):  # a setting outside of the objective
            return f"as published, {remark}"
        return f"differs: {remark}" if remark else "as published"


def of_objective(objective: Objective) -> list[Paper]:
    """The entries of the section `Papers:` of its docstring."""
    for part in paragraphs(objective.module):
        if part.startswith("Papers:"):
            entries = re.split(r"^- ", part.removeprefix("Papers:"), flags=re.MULTILINE)[1:]
            return [Paper(objective.name, " ".join(entry.split())) for entry in entries]
    raise ValueError(f"the docstring of {objective.name} lists no papers; add a section `Papers:`")


def of_recipe(path: Path) -> list[str] | None:
    """Name, title, difference and result of a recipe; None where no paper is behind it."""
    fields = header(path)
    if "arXiv" not in fields["title"]:
        return None
    difference = fields.get("difference", "nothing that its header names")
    return [
        f"`{path.stem}`",
        linked(escaped(fields["title"])),
        escaped(difference),
        escaped(fields["result"]),
    ]


def header(path: Path) -> dict[str, str]:
    """The comment that opens a recipe: its title and its named fields, each on one line."""
    fields, name = {"title": ""}, "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        opening = FIELD.fullmatch(line)
        if opening:
            name, line = opening[1], opening[2]
        fields[name] = f"{fields.get(name, '')} {line.removeprefix('#').strip()}".strip()
    return fields


def linked(text: str) -> str:
    """Numbers of arXiv as links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
