"""The results of a suite as one HTML file that loads nothing."""

from __future__ import annotations

from typing import Any

from vlp.eval.report import markup
from vlp.eval.report.markup import Html, tag
from vlp.eval.report.records import not_comparable
from vlp.eval.suites import Entry
from vlp.eval.suites.places import looked_for
from vlp.eval.suites.summary import Row, Summary, average_line, cells
from vlp.privacy import private, shareable

BAR_PX = 120


def page(summary: Summary, model: str, records: list[dict[str, Any]]) -> str:
    """Main scores, what leaves the average incomparable, absent sets, and all scores."""
    sections = [
        markup.section("main", "Main scores", _main(summary), lead=average_line(summary)),
        *_absent(summary.absent),
        markup.section("all", "All scores", [_all(record) for record in records]),
    ]
    warnings = [markup.note(private(line)) for line in not_comparable(records)]
    if warnings:
        sections.insert(1, markup.section("incomparable", "Not comparable", warnings))
    return markup.page(f"{summary.title}: {shareable(model, 'model')}", sections, "vlp eval")


def _main(summary: Summary) -> Html:
    head = ("set", "score", "", "value", "95 %", "chance")
    rows = []
    for row in summary.rows:
        name, score, value, interval, chance = cells(row)
        rows.append((name, score, _bar(row), value, interval, chance))
    return markup.table(head, rows, numeric=3)


def _bar(row: Row) -> Html | None:
    """The value as a length."""
    if row.value is None:
        return None
    length = round(BAR_PX * min(1.0, max(0.0, row.value)))
    style = f"display:inline-block;height:.7em;width:{length}px;background:currentColor;opacity:.5"
    return tag("span", style=style, title=f"{row.value:.4f}")


def _absent(absent: list[Entry]) -> list[Html]:
    """The section of absent sets, if there are any."""
    if not absent:
        return []
    rows = [(entry.name, looked_for(entry), entry.get) for entry in absent]
    head = ("set", "looked for", "get it from")
    part = markup.table(head, rows, numeric=len(head))
    return [markup.section("absent", "Absent sets", part)]


def _all(record: dict[str, Any]) -> Html:
    """Every score of a set, folded away."""
    rows = []
    for name, value in record["metrics"].items():
        bounds = record["intervals_95"].get(name)
        interval = "" if bounds is None else f"{bounds[0]:.4f} … {bounds[1]:.4f}"
        chance = record["chance"].get(name)
        rows.append((name, f"{value:.4f}", interval, "" if chance is None else f"{chance:.4f}"))
    part = markup.table(("score", "value", "95 %", "chance"), rows)
    counted = [f"{n:,} {noun}" for noun, n in record["counts"].items() if n]
    return markup.more(record["label"], markup.note(", ".join(counted)), part)
