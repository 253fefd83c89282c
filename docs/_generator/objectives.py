"""The pages of the objectives: a table of all, and one page each, in the words of their files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from _generator import configuration
from _generator.text import markdown, paragraphs, table
from vlp import losses, plugin

PACKAGE = "vlp.losses"
MEASURED = Path(__file__).resolve().parent.parent / "results" / "terms.json"
LARGEST = 4096  # rows of the largest batch in MEASURED
COLUMNS = ["name", "what it is", "formula", "paper", "needs", "cost", "when"]

OVERVIEW = """# All objectives

Which of them suits which data: [Which data, which objective](../../objectives.md). Cost is that of
forward and backward over B = 4,096 rows of D = 256 on 2 CPU cores, and the memory beyond the
embeddings; where it is empty, see the page or [Results](../../results.md).
"""
ABOUT_COST = """On 2 CPU cores. One B × B matrix of float32, which no term stores, would be 4 MiB at
1,024 and 64 MiB at 4,096 rows. More in [Results](../../results.md)."""


def pages(sections: list[Any]) -> dict[str, str]:
    """File names and texts of all pages. sections: of the configuration, for the options."""
    by_name = {section.name: section for section in sections}
    found = everything()

    texts = {f"objectives/{o.name}.md": o.page(by_name[f"objective.{o.name}"]) for o in found}
    return texts | {"objectives/index.md": overview(found)}


def everything() -> list[Objective]:
    """Every objective of the package, by name."""
    return [Objective(name, plugin.load(PACKAGE, name)) for name in plugin.names(PACKAGE)]


def overview(objectives: list[Objective]) -> str:
    """The table of all objectives, and the list that Sphinx finds their pages by."""
    # The pages are reached through the table; without this list Sphinx would miss them.
    names = "\n".join(objective.name for objective in objectives)
    hidden = f"```{{toctree}}\n:hidden:\n\n{names}\n```"
    return f"{OVERVIEW}\n{table(COLUMNS, [o.row() for o in objectives])}\n\n{hidden}\n"


@dataclass(frozen=True)
class Objective:
    """What a file of vlp/losses says of itself."""

    name: str
    module: ModuleType

    @property
    def summary(self) -> str:
        """The docstring's first sentence, without its reference."""
        opening = " ".join(paragraphs(self.module)[0].split())

        # The number of the paper has a column of its own.
        sentence = re.split(r"(?<=\.)\s", opening)[0]
        return re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", sentence)

    @property
    def formula(self) -> str:
        """The first line that defines L; empty where its forms have one each."""
        for part in paragraphs(self.module)[1:]:
            for line in part.splitlines():
                if re.search(r"\bL\s+=", line):
                    # Conditions follow after some spaces; they stand on the page.
                    return re.split(r"\s{2,}", line.strip())[0].rstrip(",. ")
        return ""

    @property
    def papers(self) -> list[str]:
        # A line may break between the word and the number.
        numbers = re.findall(r"arXiv\s+(\d{4}\.\d{5})", self.module.__doc__ or "")
        return [f"[{n}](https://arxiv.org/abs/{n})" for n in dict.fromkeys(numbers)]

    @property
    def needs(self) -> list[str]:
        """What it reads beyond the pairs and their scale, with its default options."""
        if hasattr(self.module, "NEEDS"):
            needed = self.module.NEEDS
        else:
            needed = self.module.needs(self.module.Options())

        # Every call has these three.
        return sorted(needed - {"image", "text", "scale"})

    @property
    def when(self) -> str:
        """The paragraph `Use:` of the docstring; empty where there is none."""
        for part in paragraphs(self.module):
            if part.startswith("Use:"):
                return " ".join(part.removeprefix("Use:").split())
        return ""

    @property
    def costs(self) -> list[dict[str, Any]]:
        """What the benchmark of terms measured of it and of its forms."""
        rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]

        # The forms of a family are named NAME.FORM; a row without a time ran out of it.
        return [row for row in rows if row["term"].split(".")[0] == self.name and row["ms"]]

    def row(self) -> list[str]:
        """Its line in the table of all."""
        # Of a family the first form stands for all.
        largest = [row for row in self.costs if row["B"] == LARGEST]
        return [
            f"[{self.name}]({self.name}.md)",
            self.summary,
            f"`{self.formula}`" if self.formula else "by form",
            ", ".join(self.papers),
            ", ".join(f"`{name}`" for name in self.needs) or "pairs alone",
            cost(largest[0]) if largest else "",
            self.when,
        ]

    def page(self, section: Any) -> str:
        """Its docstring, options, what supplies what it reads, and what it costs."""
        parts = [
            f"# {self.name}",
            markdown(self.module),
            "## Configuration",
            f"```yaml\nobjective: {{{self.name}: {{}}}}\n```",
            configuration.keys(section),
            "`weight` is a key of every term: a number, or `{start, end, steps}`.",
        ]

        supplied = [(name, losses.supplier(name)) for name in self.needs]
        lines = [f"- `{name}`: {source}" for name, source in supplied if source]
        if lines:
            parts += ["## What supplies what it reads", "\n".join(lines)]

        # What was measured stands apart from what the docstring derives.
        if self.costs:
            rows = [[row["term"], f"{row['B']:,}", str(row["D"]), cost(row)] for row in self.costs]
            measured = table(["form", "B", "D", "forward and backward, extra memory"], rows)
            parts += ["## Measured cost", measured, ABOUT_COST]

        parts.append(f"The code: `vlp/losses/{self.name}.py`")
        return "\n\n".join(parts) + "\n"


def cost(row: dict[str, Any]) -> str:
    return f"{row['ms']:,.0f} ms, {row['extra MiB']:.0f} MiB"
