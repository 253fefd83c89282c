"""`vlp data stats`: distributions over a whole data set, as one page to look at and one JSON file.

    DIR/stats.html    resolutions, aspect ratios, file sizes, caption lengths, numbers, languages
    DIR/stats.json    the same with all values: {"counts", "distributions": {name: {"quantiles", "values"}}}

Sizes come from the pictures' headers, none is decoded. A language is guessed from a caption's
script and stop words (see _captions.py), wrong for short captions and for languages that are not in
the list. Numbers are those from two to ten that count something exactly, as `vlp data counting`
reads them.
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
  srun --ntasks=16 vlp data stats "data/{00000..09999}.tar" --to stats/train
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
    from vlp.data_tools._run.shards import claim, jobs
    from vlp.files import write_atomically

    sources, pool, folder = expand(args.source), work.pool(args), Path(args.to)
    claim(folder, "stats", sources, {})
    results = work.carry_out("stats", jobs(sources, folder, "counted"), count, pool)
    if not work.all_done(results):
        return 0
    counts, values = (
        work.total(results),
        {name: _merged(results, name) for name in (*PICTURES, *CAPTIONS)},
    )
    told = {
        name: {"quantiles": quantiles(found), "values": dict(found)}
        for name, found in values.items()
    }
    write_atomically(
        folder / "stats.json",
        json.dumps({"counts": counts, "distributions": told}, indent=1).encode(),
    )
    write_atomically(
        folder / "stats.html", page(args.source, len(sources), counts, values).encode()
    )
    print(work.report(counts, f"{folder / 'stats.html'}, {folder / 'stats.json'}:"))
    return 0


def count(job: tuple[int, Path]) -> work.Result:
    """{"counts", and for each name of PICTURES and CAPTIONS {value: how often}} of one shard."""
    from vlp.data.picture import BadImage, header
    from vlp.data_tools._english import numbers, traits
    from vlp.data_tools._run.shards import samples

    counts: Counter[str] = Counter()
    values: dict[str, Counter] = {name: Counter() for name in (*PICTURES, *CAPTIONS)}
    for sample in samples(job[1], counts):
        values["type"][sample.image_type] += 1
        values["kilobytes"][round(len(sample.image) / 1000)] += 1
        values["captions"][len(sample.captions)] += 1
        try:
            width, height, *_ = header(sample.image)
        except BadImage:
            counts["unreadable: pictures"] += 1
        else:
            values["width"][width] += 1
            values["height"][height] += 1
            values["aspect"][round(width / height, 2)] += 1
        for caption in sample.captions:
            found, _ = numbers.counts(caption)
            values["words"][len(caption.split())] += 1
            values["characters"][len(caption)] += 1
            values["language"][traits.language(caption)] += 1
            values["numbers"].update({counted.value for counted in found})
            counts["captions"] += 1
            counts["captions that count something"] += bool(found)
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
    places = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    result, seen, waiting, n = {}, 0, list(places.items()), values.total()
    for value, times in sorted(values.items()):
        seen += times
        while waiting and seen > waiting[0][1] * (n - 1):
            result[waiting.pop(0)[0]] = value
    return result


def page(source: str, n_shards: int, counts: Counter[str], values: dict[str, Counter]) -> str:
    """The plots as one HTML page that loads nothing."""
    from vlp.eval.report import charts, markup
    from vlp.privacy import private

    def cards(names: dict[str, str]) -> Html:
        drawn = []
        for name, title in names.items():
            middle = quantiles(values[name]).get("median")
            drawn.append(
                charts.bars(
                    title, binned(values[name]), f"median {middle:g}" if middle is not None else ""
                )
            )
        return markup.tag("div", drawn, class_="cards")

    facts = markup.table(
        ("", "number"),
        [("shards", f"{n_shards:,}"), *((name, f"{counts[name]:,}") for name in sorted(counts))],
    )
    sections = [
        markup.section("counts", "Counts", facts),
        markup.section("pictures", "Pictures", cards(PICTURES)),
        markup.section(
            "captions",
            "Captions",
            cards(CAPTIONS),
            lead="Languages are guessed by script and stop words.",
        ),
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
    ordered, low, seen = sorted(values.items()), min(values), 0
    high = next(
        value for value, times in ordered if (seen := seen + times) >= 0.99 * values.total()
    )
    width = (high - low) / _BINS or 1
    width = math.ceil(width) if isinstance(low, int) else width
    result = [0] * _BINS
    for value, times in ordered:
        result[min(int((value - low) / width), _BINS - 1)] += times
    return [
        (f"{low + i * width:.3g}" + "+" * (i == _BINS - 1), times) for i, times in enumerate(result)
    ]
