"""`vlp data balance`: shards → the same shards with about as many samples of a frequent thing as of
a rarer one, by a list of queries (MetaCLIP, arXiv 2309.16671).

All captions are searched for the queries (see `queries`), each query is counted over all shards,
and of those above the cap samples are drawn (see `draw`). A sample that holds no query is dropped.

    DIR/balance.json, balance.html    how evenly the queries are covered, before and after
    DIR/counts.tsv                    every query with its counts

With --report-only these are all: without --cap they tell what is there, with it what would stay.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data_tools.balance.queries import Queries
    from vlp.data_tools.balance.report import Counts

HELP = "balance samples over queries that their captions hold (MetaCLIP), or report how they lie"
EXAMPLE = """vlp data balance data/clean --queries metadata.json --cap 20000 --to data/balanced
  vlp data balance data/clean --queries metadata.json --report-only --to stats/concepts
  vlp data balance data/clean --queries words.txt --ignore-case --cap 500 --seed 1 --to data/even
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data balance`."""
    add = parser.add_argument
    work.source_argument(parser)
    add(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the new shards and the report; the same call goes on where one stopped",
    )
    add(
        "--queries",
        required=True,
        metavar="FILE",
        help="what captions are searched for: .json, a list of texts (MetaCLIP's metadata.json); "
        ".txt, one a line",
    )
    add("--ignore-case", action="store_true", help="capitals do not count (published: they do)")
    add(
        "--cap",
        type=int,
        metavar="T",
        help="about so many samples of a query stay, where it is no more frequent all of them",
    )
    add("--seed", type=int, default=0, metavar="S", help="of the draw (default: %(default)s)")
    add("--report-only", action="store_true", help="write the report and no shards")
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Match, count, draw, write; print how the queries lie before and after."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, jobs, transform
    from vlp.data_tools.balance.draw import KeepDrawn, Match
    from vlp.data_tools.balance.queries import read

    _check(args)
    queries = read(args.queries, args.ignore_case)
    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    claim(folder, "balance", sources, _settings(args, queries))

    # A query's count, and with it every sample's fate, is known once all shards are read.
    matching = Match(folder, queries)
    matched = work.carry_out("matches", jobs(sources, folder, "matches"), matching, pool)
    if not work.all_done(matched):
        return 0
    counts = work.total(matched)
    if not counts["samples that hold a query"]:
        raise ValueError(
            f"no caption of {args.source} holds one of the {len(queries):,} queries of "
            f"{args.queries}; look at both, and at --ignore-case"
        )

    drawn = _drawn(args, queries, folder, sources, pool)
    if drawn is None:
        return 0
    of_queries, expected = drawn
    if not args.report_only:
        results = transform(sources, folder, "balance", KeepDrawn(folder), pool)
        # Both passes read all samples, which is said once.
        counts |= work.total(results)
        if not work.all_done(results):
            print(work.report(counts, f"{folder}:"))
            return 0

    _write_report(args.source, folder, counts, of_queries, expected)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.cap is not None and args.cap < 1:
        raise ValueError(f"--cap {args.cap} must be at least 1: so many samples a query may keep")
    if args.cap is None and not args.report_only:
        raise ValueError(
            "--cap T is not given: about so many samples of each query stay, as MetaCLIP's 20000; "
            "to see the counts first, say --report-only"
        )
    if args.cap is None and args.seed:
        raise ValueError("--seed is of the draw, which needs --cap T")


def _settings(args: argparse.Namespace, queries: Queries) -> dict[str, Any]:
    """What the output depends on, besides the source; the queries by content."""
    return {
        "queries": queries.digest(),
        "ignore_case": args.ignore_case,
        "cap": args.cap,
        "seed": args.seed,
        "report_only": args.report_only,
    }


def _drawn(
    args: argparse.Namespace, queries: Queries, folder: Path, sources: list[Path], pool: work.Pool
) -> tuple[Counts, dict[str, float]] | None:
    """The counts of all queries, and how many samples were to be expected; None while other
    machines draw.
    """
    import numpy as np

    from vlp.data_tools._run.shards import jobs
    from vlp.data_tools.balance.draw import Draw, kept_file, matches_file, totals
    from vlp.data_tools.balance.report import Counts

    numbers = range(len(sources))
    before = totals((matches_file(folder, number) for number in numbers), len(queries))
    if args.cap is None:
        return Counts(queries.texts, before), {}

    probabilities = np.minimum(1, args.cap / np.maximum(before, 1))
    drawing = Draw(folder, args.seed, queries.hashes(), probabilities)
    drawn = work.carry_out("draw", jobs(sources, folder, "kept"), drawing, pool)
    if not work.all_done(drawn):
        return None
    after = totals((kept_file(folder, number) for number in numbers), len(queries))
    expected = {
        "kept": work.total(drawn)["samples kept"],
        "expected": round(sum(result["expected"] for result in drawn), 1),
        "standard_deviation": round(sum(result["variance"] for result in drawn) ** 0.5, 1),
    }
    return Counts(queries.texts, before, after, args.cap), expected


def _write_report(
    source: str,
    folder: Path,
    counts: Counter[str],
    of_queries: Counts,
    expected: dict[str, float],
) -> None:
    from vlp.data_tools.balance import report
    from vlp.files import write_atomically

    summary = of_queries.summary()
    written = {"counts": counts, "samples": expected, **summary}
    table = "".join(of_queries.table())
    write_atomically(folder / "counts.tsv", table.encode(errors="surrogatepass"))
    content = json.dumps(written, indent=1, ensure_ascii=False)
    write_atomically(folder / "balance.json", content.encode(errors="surrogatepass"))
    page = report.page(source, counts, of_queries)
    write_atomically(folder / "balance.html", page.encode(errors="surrogatepass"))

    title = f"{folder}, with balance.html, balance.json, counts.tsv:"
    print(work.report(counts, title))
    print(work.printable(report.text(summary)))
    if expected:
        kept, likely = int(expected["kept"]), expected["expected"]
        print(f"  drawn: {kept:,}; expected {likely:,.0f} ± {expected['standard_deviation']:,.0f}")
