"""How evenly a data set covers its queries, before and after: numbers, a table, a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vlp.eval.report.markup import Html

N_SHOWN = 20  # of the commonest and of the rarest queries
_BLANKS = str.maketrans("\t\r\n", "   ")
_DECADES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Counts:
    """How often each query occurs, int64 [queries]; `after` is None where nothing was drawn."""

    texts: list[str]
    before: np.ndarray
    after: np.ndarray | None = None
    cap: int | None = None

    @property
    def order(self) -> np.ndarray:
        """The queries' numbers, the commonest first; equal ones in their order."""
        return np.argsort(-self.before, kind="stable")

    def summary(self) -> dict[str, Any]:
        """The numbers as JSON."""
        summary: dict[str, Any] = {"queries": len(self.texts), "before": evenness(self.before)}
        if self.cap is not None:
            # Published as t and p: what lies above the cap, and the share of matches that do not.
            n_head = int((self.before > self.cap).sum())
            in_tail = int(self.before[self.before <= self.cap].sum())
            summary |= {"cap": self.cap, "head_queries": n_head}
            summary["tail_share_of_matches"] = in_tail / max(1, int(self.before.sum()))
        if self.after is not None:
            summary["after"] = evenness(self.after)
        matched = [number for number in self.order.tolist() if self.before[number]]
        summary["commonest"] = [self._row(number) for number in matched[:N_SHOWN]]
        summary["rarest"] = [self._row(number) for number in matched[::-1][:N_SHOWN]]
        return summary

    def _row(self, number: int) -> dict[str, Any]:
        row = {"query": self.texts[number], "before": int(self.before[number])}
        if self.after is not None:
            row["after"] = int(self.after[number])
        return row

    def table(self) -> Iterator[str]:
        """All queries with their counts, a line each, the commonest first (tab-separated)."""
        yield "query\tbefore\n" if self.after is None else "query\tbefore\tafter\n"
        for number in self.order.tolist():
            # A query may hold what divides columns and lines, though no caption then holds it.
            cells = (str(value).translate(_BLANKS) for value in self._row(number).values())
            yield "\t".join(cells) + "\n"


def evenness(counts: np.ndarray) -> dict[str, Any]:
    """Of the queries that occur: how many, how often together, and how evenly.

    gini             0: all equally often; near 1: a few have all (mean absolute difference over
                     twice the mean)
    entropy_bits     H = −Σ f log2 f of the shares f of all matches
    as_even_as       2^H: so many equally frequent queries would have this entropy
    """
    occurring = np.sort(counts[counts > 0]).astype(np.float64)
    n, total = len(occurring), occurring.sum()
    if not n:
        zeros = {"gini": 0.0, "entropy_bits": 0.0, "as_even_as": 0.0}
        return {"queries_that_occur": 0, "matches": 0, **zeros}

    ranks = np.arange(1, n + 1)
    gini = float(((2 * ranks - n - 1) * occurring).sum() / (n * total))
    shares = occurring / total
    entropy = float(-(shares * np.log2(shares)).sum())
    return {
        "queries_that_occur": n,
        "matches": int(total),
        "gini": round(gini, 4),
        "entropy_bits": round(entropy, 4),
        "as_even_as": round(2**entropy, 1),
    }


def text(summary: dict[str, Any]) -> str:
    """The evenness and the commonest queries, as lines for a terminal."""
    lines = []
    for when in ("before", "after"):
        if when in summary:
            one = summary[when]
            lines.append(
                f"  {when}: {one['queries_that_occur']:,} of {summary['queries']:,} queries occur, "
                f"{one['matches']:,} times; Gini {one['gini']:.3f}, as even as "
                f"{one['as_even_as']:,.0f}"
            )
    if "cap" in summary:
        lines.append(
            f"  cap {summary['cap']:,}: {summary['head_queries']:,} queries lie above it; "
            f"{summary['tail_share_of_matches']:.1%} of the matches are of the others"
        )
    commonest = [_shown(row) for row in summary["commonest"][:5]]
    return "\n".join([*lines, f"  commonest: {'; '.join(commonest)}"])


def _shown(row: dict[str, Any]) -> str:
    after = f" → {row['after']:,}" if "after" in row else ""
    return f"{row['query']} {row['before']:,}{after}"


def page(source: str, numbers: dict[str, int], counts: Counts) -> str:
    """The same as one HTML page that loads nothing."""
    from vlp.eval.report import charts, markup
    from vlp.privacy import private

    summary = counts.summary()
    rows = [(name, f"{numbers[name]:,}") for name in sorted(numbers)]
    when = [name for name in ("before", "after") if name in summary]
    even = [(name, *(json.dumps(summary[one][name]) for one in when)) for name in summary["before"]]
    cards = [
        charts.bars(f"queries by count, {one}", _by_decade(getattr(counts, one))) for one in when
    ]
    sections = [
        markup.section("counts", "Counts", markup.table(("", "number"), rows)),
        markup.section("evenness", "Evenness", markup.table(("", *when), even)),
        markup.section("queries", "Queries", markup.tag("div", cards, class_="cards")),
        *(_listed(name, summary[name]) for name in ("commonest", "rarest")),
    ]
    return markup.page(private(source), sections, "vlp data balance")


def _listed(name: str, rows: list[dict[str, Any]]) -> Html:
    from vlp.eval.report import markup

    head = list(rows[0]) if rows else ["query", "before"]
    cells = [list(row.values()) for row in rows]
    return markup.section(name, f"The {name}", markup.table(head, cells))


def _by_decade(counts: np.ndarray) -> list[tuple[str, float]]:
    """How many queries have 0, 1–9, 10–99, … matches."""
    bars: list[tuple[str, float]] = [("0", int((counts == 0).sum()))]
    for low, high in zip(_DECADES, (*_DECADES[1:], np.inf)):
        label = f"{low:,}+" if high == np.inf else f"{low:,}–{high - 1:,}"
        bars.append((label, int(((counts >= low) & (counts < high)).sum())))
    return bars
