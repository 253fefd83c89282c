"""HTML from Python: whatever is not `Html` is escaped, so no caption, path or message can become
markup.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

VOID = {"br", "img", "input", "meta"}


class Html(str):
    """Text that is markup already."""


# --- elements -------------------------------------------------------------------------------------


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children are Html, text (escaped), numbers, None (nothing) or lists of these;
    `class_` means class.
    """
    parts = []
    for key, value in attributes.items():
        if value is not None:
            # class_ and for_ are words of Python, data_x and aria_label names with a dash.
            attribute = key.rstrip("_").replace("_", "-")
            parts.append(f' {attribute}="{escape(str(value))}"')

    opening = f"<{name}{''.join(parts)}>"
    return Html(opening if name in VOID else f"{opening}{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Children one after another."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(str(child)))
    return Html("".join(parts))


def section(key: str, title: str, *children: Any, lead: str | None = None) -> Html:
    """A part of the page with its heading, and one sentence on what it shows."""
    sentence = tag("p", lead, class_="lead") if lead else None
    return tag("section", tag("h2", title), sentence, *children, id=key)


def note(text: str) -> Html:
    """What is missing, and why."""
    return tag("p", text, class_="note")


def more(title: str, *children: Any, open_: bool = False) -> Html:
    """A part that is folded away."""
    return tag("details", tag("summary", title), *children, **({"open": ""} if open_ else {}))


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], numeric: int = 1) -> Html:
    """A table that scrolls in itself where it is too wide; columns from `numeric` on are aligned as
    numbers.
    """

    def cells(kind: str, row: Sequence[Any]) -> list[Html]:
        return [tag(kind, cell, class_="n" if i >= numeric else None) for i, cell in enumerate(row)]

    head_part = tag("thead", tag("tr", cells("th", head)))
    body_part = tag("tbody", [tag("tr", cells("td", row)) for row in rows])
    return tag("div", tag("table", head_part, body_part), class_="wide")


def number(value: float) -> str:
    """A number for the eye: four significant digits, no exponent where people would write none."""
    if not math.isfinite(value):
        return "not finite"
    # 3e-5, not 3.00e-05.
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# --- the document ---------------------------------------------------------------------------------


def page(title: str, sections: Sequence[Html], kind: str = "vlp report") -> str:
    """The whole document, with its style and its few lines of script inside; `kind` says which
    command made it.
    """
    folder = resources.files("vlp.eval.report")

    # Inside the page: it must open without a network and without files beside it.
    style = (folder / "style.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · {kind}"),
        tag("style", Html(style)),
    )
    body = tag(
        "body",
        tag("header", tag("p", kind, class_="kind"), tag("h1", title)),
        tag("nav", _links(sections)),
        tag("main", sections),
        tag("div", id="tip", hidden="hidden"),
        tag("script", Html(script)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _links(sections: Sequence[Html]) -> list[Html]:
    """A link to each section, under its heading, which is markup already."""
    matches = [re.search(r'id="([\w-]+)"><h2>([^<]*)', text) for text in sections]
    return [tag("a", Html(match[2]), href=f"#{match[1]}") for match in matches if match]
