"""The pages' section on certainty: R@1 over the share of queries that is kept, and by certainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from statistics import mean
from typing import Any

from vlp.eval.certainty import SHARES
from vlp.eval.report.charts import Point, Series, curve
from vlp.eval.report.markup import Html, section, tag

# of each way of retrieval: what seeks, and how many of those a record counts
QUERIES = {"text": ("images seek texts", "images"), "image": ("texts seek images", "captions")}
LEAD = (
    "R@1 of the most certain share of the queries, and of the tenths, the least certain first. A "
    "certainty that says nothing gives level lines."
)
Record = dict[str, Any]


def certainty(shown: Sequence[tuple[str, Sequence[Record]]], legend: Html | None) -> Html | None:
    """The section for runs or arms, each with its name and the records of its seeds; None where no
    record was asked for certainty.
    """
    tasks: dict[tuple[str, str, str], None] = {}
    for _, records in shown:
        tasks |= dict.fromkeys(map(_task, records))

    cards = []
    for task in tasks:
        label, dataset, _ = task
        for way, (title, _) in QUERIES.items():
            of_task = [
                (name, [record for record in records if _task(record) == task])
                for name, records in shown
            ]
            of_what = " · ".join(filter(None, (label, dataset, title)))
            cards += _cards(of_what, way, of_task)
    if not cards:
        return None
    return section("certainty", "Certainty", legend, tag("div", cards, class_="cards"), lead=LEAD)


def _task(record: Record) -> tuple[str, str, str]:
    """What a curve is of: the label, and the data by name and content."""
    return record["label"], record.get("dataset") or "", record.get("data_sha256") or ""


def _cards(title: str, way: str, shown: list[tuple[str, list[Record]]]) -> list[Html]:
    """Two curves of one way of retrieval; none where no record has them."""
    kept = _series(shown, lambda record: shares_kept(record, way))
    if not kept:
        return []

    # That of all queries holds for any share of them.
    name = f"{way}_retrieval_recall@1"
    records = chain.from_iterable(records for _, records in shown)
    level = next((of for r in records if (of := r.get("chance", {}).get(name)) is not None), None)
    drawn = [curve(f"{title}, kept", kept, level, over="% kept")]
    tenths = _series(shown, lambda record: by_tenth(record, way))
    if tenths:
        drawn.append(curve(f"{title}, by tenth", tenths, level, over="tenth"))
    return drawn


def _series(
    shown: list[tuple[str, list[Record]]], points_of: Callable[[Record], list[Point]]
) -> list[Series]:
    """A curve a name, the mean over its seeds; none for those without points."""
    series = []
    for color, (name, records) in enumerate(shown):
        of_seeds = [points for record in records if (points := points_of(record))]
        if of_seeds:
            middle = [(at[0][0], mean(value for _, value in at)) for at in zip(*of_seeds)]
            series.append(Series(name, middle, color))
    return series


def shares_kept(record: Record, way: str) -> list[Point]:
    """(per cent kept, R@1) from the smallest share on; none where certainty was not asked for."""
    scores, name = record["metrics"], f"{way}_retrieval_recall@1"
    of_shares = {share: f"{name}_of_{share:.0%}" for share in SHARES} | {1.0: name}
    if f"{name}_of_{SHARES[1]:.0%}" not in scores:
        return []
    return [
        (100 * share, float(scores[of_shares[share]]))
        for share in sorted(SHARES)
        if of_shares[share] in scores
    ]


def by_tenth(record: Record, way: str) -> list[Point]:
    """(tenth, R@1 of its queries), the least certain tenth first: what each share has beyond the
    one before it; none where the number of queries is not known.
    """
    n_queries = record.get("counts", {}).get(QUERIES[way][1])
    points = shares_kept(record, way)
    if not points or not n_queries:
        return []

    tenths, n_before, hits_before = [], 0, 0.0
    for place, (per_cent, value) in enumerate(points):
        # As vlp.eval.certainty.kept rounds it.
        n_kept = max(1, round(per_cent / 100 * n_queries))
        hits = value * n_kept
        if n_kept > n_before:
            tenth = len(SHARES) - place
            tenths.append((float(tenth), (hits - hits_before) / (n_kept - n_before)))
        n_before, hits_before = n_kept, hits
    return tenths[::-1]
