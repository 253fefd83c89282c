"""`vlp data stats`: distributions over a whole data set, as one page to look at and one JSON file.

    DIR/stats.html    resolutions, aspect ratios, file sizes, caption lengths, numbers, languages
    DIR/stats.json    the same with all values:
                      {"counts", "distributions": {name: {"quantiles", "values"}}}

Sizes come from the pictures' headers, none is decoded. A language is guessed from a caption's
script and stop words (see _english/traits.py), wrong for short captions and for languages that
are not in the list. Numbers are those from two to ten that count something exactly, as `vlp data
counting` reads them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.eval.report.markup import Html

HELP = "plots and numbers about pictures and captions of all shards"
EXAMPLE = """vlp data stats data/train --to stats/train --processes 8
  vlp data stats "data/{00000..09999}.tar" --to stats/train --ray head:6379
"""
# What is counted, in the page's order, with what it is on the page.
PICTURES = {
    "width": "width, px",
    "height": "height, px",
    "aspect": "width / height",
    "kilobytes": "kB a picture",
    "type": "file type",
}
CAPTIONS = {
    "captions": "captions a sample",
    "words": "words a caption",
    "characters": "characters a caption",
    "numbers": "what captions count",
    "language": "language of captions (a guess)",
}
_BINS = 24


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data stats`."""
    parser.add_argument(
        "source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::"
    )
    parser.add_argument(
        "--to",
        required=True,
        metavar="DIR",
        help="folder for the page; the same call goes on where one stopped",
    )
    work.arguments(parser)


@work.alone
def run(args: argparse.Namespace) -> int:
    """Count, and write the page once all shards are counted."""
    from vlp.data.paths import expand
    from vlp.data.stored import destination
    from vlp.data_tools._run.shards import claim, jobs
    from vlp.files import write_atomically

    sources, pool, folder = expand(args.source), work.pool(args), destination(args.to)
    claim(folder, "stats", sources, {})
    results = work.carry_out("stats", jobs(sources, folder, "counted"), count, pool)
    if not work.all_done(results):
        return 0

    # Once for the whole set: quantiles of shards do not add up.
    counts = work.total(results)
    values = {name: _merged(results, name) for name in (*PICTURES, *CAPTIONS)}
    distributions = {
        name: {"quantiles": quantiles(times_of), "values": dict(times_of)}
        for name, times_of in values.items()
    }
    summary = json.dumps({"counts": counts, "distributions": distributions}, indent=1)

    write_atomically(folder / "stats.json", summary.encode())
    html = page(args.source, len(sources), counts, values)
    write_atomically(folder / "stats.html", html.encode())
    print(work.report(counts, f"{folder / 'stats.html'}, {folder / 'stats.json'}:"))
    return 0


def count(job: tuple[int, Path]) -> work.Result:
    """{"counts", and for each name of PICTURES and CAPTIONS {value: how often}} of one shard."""
    from vlp.data.picture import BadImage, header
    from vlp.data_tools._english import numbers, traits
    from vlp.data_tools._run.shards import samples

    _, path = job
    counts: Counter[str] = Counter()
    values: dict[str, Counter] = {name: Counter() for name in (*PICTURES, *CAPTIONS)}
    for sample in samples(path, counts):
        values["type"][sample.image_type] += 1
        values["kilobytes"][round(len(sample.image) / 1000)] += 1
        values["captions"][len(sample.captions)] += 1

        # Only the header is read: decoding would take most of the time.
        try:
            width, height, *_ = header(sample.image)
        except BadImage:
            counts["unreadable: pictures"] += 1
        else:
            values["width"][width] += 1
            values["height"][height] += 1
            values["aspect"][round(width / height, 2)] += 1

        for caption in sample.captions:
            values["words"][len(caption.split())] += 1
            values["characters"][len(caption)] += 1
            values["language"][traits.language(caption)] += 1
            counts["captions"] += 1

            # A number that stands twice in a caption is one.
            exact, _ = numbers.counts(caption)
            values["numbers"].update({counted.value for counted in exact})
            if exact:
                counts["captions that count something"] += 1
    return {"counts": counts, **values}


def _merged(results: list[work.Result], name: str) -> Counter:
    """The sum over shards, sorted by value; JSON made texts of the numbers."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result[name])
    if name in ("type", "language"):
        return Counter(dict(total.most_common()))
    return Counter({value: total[str(value)] for value in sorted(map(json.loads, total))})


def quantiles(values: Counter) -> dict[str, float]:
    """Smallest, 5 %, median, 95 %, largest of counted numbers; {} where there are none, and for
    names.
    """
    if not values or isinstance(next(iter(values)), str):
        return {}

    # The smallest value of which so many are not larger, all places in one pass.
    places = [("min", 0.0), ("p5", 0.05), ("median", 0.5), ("p95", 0.95), ("max", 1.0)]
    n = values.total()
    n_seen = 0
    result: dict[str, float] = {}
    for value, times in sorted(values.items()):
        n_seen += times
        while places and n_seen > places[0][1] * (n - 1):
            name, _ = places.pop(0)
            result[name] = value
    return result


def page(source: str, n_shards: int, counts: Counter[str], values: dict[str, Counter]) -> str:
    """The plots as one HTML page that loads nothing."""
    from vlp.eval.report import charts, markup
    from vlp.privacy import private

    def cards_of(names: dict[str, str]) -> Html:
        cards = []
        for name, title in names.items():
            median = quantiles(values[name]).get("median")
            note = "" if median is None else f"median {median:g}"
            cards.append(charts.bars(title, binned(values[name]), note))
        return markup.tag("div", cards, class_="cards")

    # The counts first, because plots do not show what is missing.
    rows = [("shards", f"{n_shards:,}")]
    rows += [(name, f"{counts[name]:,}") for name in sorted(counts)]
    lead = "Languages are guessed by script and stop words."
    sections = [
        markup.section("counts", "Counts", markup.table(("", "number"), rows)),
        markup.section("pictures", "Pictures", cards_of(PICTURES)),
        markup.section("captions", "Captions", cards_of(CAPTIONS), lead=lead),
    ]
    return markup.page(private(source), sections, "vlp data stats")


def binned(values: Counter) -> list[tuple[str, int]]:
    """(label, how often) for a plot: the commonest names; single numbers where they are few, else
    equal ranges up to 99 %.
    """
    if not values:
        return []
    if isinstance(next(iter(values)), str):
        return values.most_common(_BINS // 2)
    if len(values) <= _BINS:
        return [(f"{value:g}", times) for value, times in sorted(values.items())]

    # Up to the value below which 99 % lie: one huge picture would leave one bar. The last bar
    # holds the rest.
    ordered = sorted(values.items())
    low = high = ordered[0][0]
    n_seen = 0
    for value, times in ordered:
        n_seen += times
        if n_seen >= 0.99 * values.total():
            high = value
            break
    width = (high - low) / _BINS or 1
    if isinstance(low, int):
        width = math.ceil(width)

    bars = [0] * _BINS
    for value, times in ordered:
        bars[min(int((value - low) / width), _BINS - 1)] += times
    labels = [f"{low + i * width:.3g}" for i in range(_BINS)]
    labels[-1] += "+"
    return list(zip(labels, bars))
