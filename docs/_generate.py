"""The pages that the code writes: objectives, configuration, API.

    write(folder)      all of them, as Markdown; called by conf.py before Sphinx reads its sources

Nothing here is remembered: a formula stands in its docstring, a default in its dataclass, a
measured cost in docs/results/terms.json.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

from vlp import plugin

try:
    from vlp.config import reference
except ImportError:  # a checkout whose configuration does not describe itself yet
    import _reference as reference

HERE = Path(__file__).resolve().parent
PUBLIC = [  # what a program calls, in the order of a reader's way
    "vlp.load",
    "vlp.eval.inference.Model",
    "vlp.config.load",
    "vlp.losses.build",
    "vlp.losses.Objective",
    "vlp.pairwise.Pairs",
    "vlp.data.loader.Loader",
    "vlp.step.train_step",
    "vlp.step.Training",
    "vlp.types.Batch",
    "vlp.eval.run.evaluate",
    "vlp.eval.run.in_training",
]


def write(folder: Path) -> None:
    """Write every generated page below `folder`, which nothing else writes to."""
    objectives = [Objective.read(name) for name in plugin.names("vlp.losses")]
    sections = reference.sections()

    keys = {section.name: section.keys for section in sections}
    pages = {f"objectives/{o.name}.md": o.page(keys[f"objective.{o.name}"]) for o in objectives}
    pages["objectives/index.md"] = overview(objectives)
    pages["configuration.md"] = configuration(sections)
    pages["api.md"] = "\n".join(["# API", "", *(described(name) for name in PUBLIC)])
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Sphinx reads again what changed: an equal page keeps its time.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# Objectives


@dataclass(frozen=True)
class Objective:
    """What a file of vlp/losses says of itself."""

    name: str
    module: ModuleType

    @classmethod
    def read(cls, name: str) -> Objective:
        return cls(name, plugin.load("vlp.losses", name))

    @property
    def summary(self) -> str:
        """The docstring's first sentence, without its reference."""
        first = " ".join(paragraphs(self.module)[0].split())
        sentence = re.split(r"(?<=[.:])\s", first)[0].rstrip(":")
        return re.sub(r"\s*\([^()]*arXiv[^()]*\)", "", sentence)

    @property
    def formula(self) -> str:
        """The first line that defines L; empty where its forms have one each."""
        lines = [line.strip() for part in paragraphs(self.module)[1:] for line in part.splitlines()]
        defining = [line for line in lines if re.search(r"\bL\s+=", line)]
        found = re.split(r"\s{2,}", defining[0])[0] if defining else ""
        return found.rstrip(",. ")

    @property
    def papers(self) -> list[str]:
        numbers = re.findall(r"arXiv\s+(\d{4}\.\d{5})", self.module.__doc__ or "")
        return [f"[{n}](https://arxiv.org/abs/{n})" for n in dict.fromkeys(numbers)]

    @property
    def needs(self) -> str:
        """What it reads beyond the pairs and their scale."""
        if hasattr(self.module, "NEEDS"):
            needed = self.module.NEEDS
        else:
            needed = self.module.needs(self.module.Options())
        extra = sorted(needed - {"image", "text", "scale"})
        return ", ".join(f"`{name}`" for name in extra) or "pairs alone"

    @property
    def when(self) -> str:
        """The paragraph of the docstring that says when to take it, where there is one."""
        for part in paragraphs(self.module):
            found = re.match(r"When(?: to use)?:?\s+(.*)", part.strip(), re.DOTALL)
            if found:
                return " ".join(found[1].split())
        return ""

    def page(self, keys: list) -> str:
        """The page of one objective: its docstring, options, and what supplies what it reads."""
        from vlp.losses._objective import SUPPLIERS

        supplied = [
            f"- `{name}`: {SUPPLIERS[name]}"
            for name in re.findall(r"`(\w+)`", self.needs)
            if name in SUPPLIERS
        ]
        return "\n".join(
            [
                f"# {self.name}",
                "",
                markdown(inspect.getdoc(self.module) or ""),
                "",
                "## Configuration",
                "",
                "```yaml",
                f"objective: {{{self.name}: {{}}}}",
                "```",
                "",
                table_of(keys),
                "",
                *(["## What supplies what it reads", "", *supplied, ""] if supplied else []),
                *self.cost(),
                f"The code: `vlp/losses/{self.name}.py`",
                "",
            ]
        )

    def cost(self) -> list[str]:
        """What benchmarks measured of it, as lines of its page."""
        rows = measured(self.name)
        if not rows:
            return []
        return [
            "## Measured cost",
            "",
            "| form | B | D | forward and backward, extra memory |",
            "|---|---|---|---|",
            *(f"| {r['term']} | {r['B']:,} | {r['D']} | {numbers(r)} |" for r in rows),
            "",
            "On 2 CPU cores; one B × B matrix of float32, which no term stores, would be "
            "4 MiB at 1,024 and 64 MiB at 4,096. More in [Results](../../results.md).",
            "",
        ]


def overview(objectives: list[Objective]) -> str:
    """The table of all objectives, in the words of their files."""
    rows = []
    for o in objectives:
        # Of a family the first form at the largest batch; the own page has all.
        largest = [row for row in measured(o.name) if row["B"] == 4096]
        cost = numbers(largest[0]) if largest else ""
        papers = ", ".join(o.papers)
        formula = f"`{o.formula}`" if o.formula else "by form"
        cells = [f"[{o.name}]({o.name}.md)", o.summary, formula, papers, o.needs, cost, o.when]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    names = "\n".join(o.name for o in objectives)
    return f"""# All objectives

Which of them suits which data: [Which data, which objective](../../objectives.md). Cost is that of
forward and backward over B = 4,096 rows of D = 256 on 2 CPU cores, and the memory beyond the
embeddings.

| name | what it is | formula | paper | needs | cost | when |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{names}
```
"""


def measured(name: str) -> list[dict]:
    """Rows of the benchmark of terms for an objective, and for each of its forms."""
    rows = json.loads((HERE / "results" / "terms.json").read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if row["term"].split(".")[0] == name and row.get("ms")]


def numbers(row: dict) -> str:
    return f"{row['ms']:,.0f} ms, {row['extra MiB']:.0f} MiB"


# Configuration


def configuration(sections: list) -> str:
    """Every key of every section, with type, default and sentence."""
    parts = [
        "# Configuration",
        "",
        "Every key of a run's YAML file. Each can be set on the command line as well, "
        "`train.batch=512`. A duration is a number of steps (`1000`), a share of the run (`5%`), "
        "epochs (`3ep`) or samples (`200ksamples`, `2Msamples`).",
        "",
    ]
    for section in sections:
        parts += [f"## {section.name or 'The run'}", "", escaped(section.summary), ""]
        parts += [table_of(section.keys), ""]
    return "\n".join(parts)


def table_of(keys: list) -> str:
    """A table of configuration keys; a sentence where there are none."""
    if not keys:
        return "It has no keys of its own."
    rows = [
        f"| `{key.name}` | `{cell(key.type)}` | {default(key)} | {escaped(cell(key.sentence))} |"
        for key in keys
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def default(key: object) -> str:
    text = cell(str(key.default))
    return f"`{text}`" if text else "required"


def cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


# API


def described(path: str) -> str:
    """A public name: its signature, its docstring, and those of its public members."""
    value = resolve(path)
    lines = [f"## {path}", "", signature(path.rpartition(".")[2], value), ""]
    lines += [markdown(inspect.getdoc(value) or ""), ""]
    if inspect.isclass(value):
        for name, member in members(value):
            lines += [f"### {path.rpartition('.')[2]}.{name}", ""]
            if callable(member):
                lines += [signature(name, member), ""]
            lines += [markdown(inspect.getdoc(member) or ""), ""]
    return "\n".join(lines)


def resolve(path: str) -> object:
    """The object of a dotted name, importing the modules on the way."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def members(cls: type) -> list[tuple[str, object]]:
    """Public methods and properties of a class that have a docstring, as they are written."""
    values = {name: member for name, member in vars(cls).items() if not name.startswith("_")}
    data = {f.name for f in fields(cls)} if hasattr(cls, "__dataclass_fields__") else set()
    return [
        (name, getattr(member, "__func__", member))
        for name, member in values.items()
        if name not in data and inspect.getdoc(member)
    ]


def signature(name: str, value: object) -> str:
    """The call in a fence, one argument a line where it is long."""
    try:
        called = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    arguments = list_of(called)
    empty = called.return_annotation in (called.empty, None, "None")
    returned = "" if empty else f" -> {called.return_annotation}"
    text = f"{name}({', '.join(arguments)}){returned}"
    if len(text) > 90:
        lines = "".join(f"    {argument},\n" for argument in arguments)
        text = f"{name}(\n{lines}){returned}"
    return f"```text\n{text}\n```"


def list_of(called: inspect.Signature) -> list[str]:
    """Arguments as they are written, with the star before those that need their name."""
    written, starred = [], False
    for p in called.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            written.append("*")
            starred = True
        annotation = "" if p.annotation is p.empty else f": {p.annotation}"
        value = "" if p.default is p.empty else f" = {p.default!r}"
        written.append(f"{p.name}{annotation}{value}")
    return [argument for argument in written if argument != "self"]


# Docstrings


def paragraphs(module: ModuleType) -> list[str]:
    return re.split(r"\n\s*\n", inspect.getdoc(module) or "")


def markdown(docstring: str) -> str:
    """A docstring as Markdown: prose stays prose; what is laid out by spaces keeps its layout."""
    parts = re.split(r"\n\s*\n", docstring)
    laid_out = [bool(re.search(r"^ {2,}|\S {3,}\S|^L = ", part, re.MULTILINE)) for part in parts]
    return "\n\n".join(
        f"```text\n{part}\n```" if fence else escaped(part)
        for part, fence in zip(parts, laid_out, strict=True)
    )


def escaped(text: str) -> str:
    """Text whose signs Markdown would read, outside of code spans."""
    spans = re.split(r"(`[^`]*`)", text)
    return "".join(
        span if span.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", span) for span in spans
    )
