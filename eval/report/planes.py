"""Charts that are no curves over steps: a measure against another, two distributions of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

from vlp.eval.report.charts import HEIGHT, WIDTH, Plot, domain, empty_card
from vlp.eval.report.markup import Html, number, tag


@dataclass(frozen=True)
class Trail:
    """Where a run stood in the plane of two measures, evaluation by evaluation."""

    name: str
    stops: Sequence[tuple[float, float, float]]  # step, across, up
    color: int = 0


def trails(title: str, axes: tuple[str, str], runs: Sequence[Trail]) -> Html:
    """A card with each run's way through the plane; `axes` name what lies across and up. Stops that
    are not finite are left out; the first and the last one are named by their steps.
    """
    ways = []
    for run in runs:
        finite = [stop for stop in run.stops if all(map(math.isfinite, stop))]
        if finite:
            ways.append(Trail(run.name, finite, run.color))
    if not ways:
        return empty_card(title, "no finite value")

    stops = list(chain.from_iterable(way.stops for way in ways))
    across = [x for _, x, _ in stops]
    up = [y for _, _, y in stops]
    # Some room, so that the labels of steps lie inside.
    plot = Plot(domain(across, 0.12), domain(up, 0.12))

    step, _, _ = ways[0].stops[-1]
    drawing = tag(
        "svg",
        plot.axes(),
        [_way(way, axes, plot) for way in reversed(ways)],  # the first run on top
        class_="plane",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_label=f"{axes[1]} against {axes[0]}, to step {step:g}",
    )
    caption = tag("p", f"Across {axes[0]}, up {axes[1]}; a dot an evaluation.", class_="small")
    return tag("figure", tag("figcaption", title), drawing, caption, class_="card")


def _way(way: Trail, axes: tuple[str, str], plot: Plot) -> Html:
    """A run's line with its dots, and the steps of its ends."""
    spots = [plot.at(x, y) for _, x, y in way.stops]
    path = " ".join(f"{left:.1f},{top:.1f}" for left, top in spots)
    drawn = [tag("polyline", points=path)]
    for (step, x, y), (left, top) in zip(way.stops, spots):
        values = f"{axes[0]} {number(x)}, {axes[1]} {number(y)}"
        hint = tag("title", f"{way.name}, step {step:g}: {values}")
        drawn.append(tag("circle", hint, cx=f"{left:.1f}", cy=f"{top:.1f}", r=3))

    ends = {way.stops[0]: spots[0], way.stops[-1]: spots[-1]}
    for (step, _, _), (left, top) in ends.items():
        place = {"x": f"{left:.1f}", "y": f"{top - 6:.1f}"}
        drawn.append(tag("text", f"{step:g}", text_anchor="middle", **place))
    return tag("g", drawn, class_=f"s{way.color}")


def distributions(
    title: str,
    kinds: Sequence[tuple[str, Sequence[float]]],  # name, shares in bins of equal width
    ends: tuple[float, float],  # where the first bin begins and the last one ends
) -> Html:
    """A card with the shares of two kinds of scores, one over the other, where there are any."""
    n_bins = len(kinds[0][1])
    filled = [i for i in range(n_bins) if any(shares[i] for _, shares in kinds)]
    if not filled:
        return empty_card(title, "no scores")

    # Only where scores lie: of cosines most of the range is empty.
    first, last = max(0, filled[0] - 1), min(n_bins, filled[-1] + 2)
    width = (ends[1] - ends[0]) / n_bins
    edges = [ends[0] + width * i for i in range(first, last + 1)]
    highest = max(chain.from_iterable(shares for _, shares in kinds))
    plot = Plot((edges[0], edges[-1]), (0.0, highest * 1.06))

    areas = [
        tag(
            "polygon", tag("title", name), points=_steps(shares, edges, first, plot), class_=f"c{i}"
        )
        for i, (name, shares) in enumerate(kinds)
    ]
    drawing = tag(
        "svg",
        plot.axes(),
        areas,
        class_="areas",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_label=title,
    )
    keys = [
        tag("span", tag("i", class_=f"k{i}"), name, class_="legend")
        for i, (name, _) in enumerate(kinds)
    ]
    legend = tag("p", keys, class_="legends")
    return tag("figure", tag("figcaption", title), drawing, legend, class_="card")


def _steps(shares: Sequence[float], edges: Sequence[float], first: int, plot: Plot) -> str:
    """The corners of a distribution's outline, whose bins from `first` on lie between `edges`."""
    corners = [plot.at(edges[0], 0)]
    for i, (left, right) in enumerate(pairwise(edges), first):
        corners += [plot.at(left, shares[i]), plot.at(right, shares[i])]
    corners.append(plot.at(edges[-1], 0))
    return " ".join(f"{across:.1f},{down:.1f}" for across, down in corners)
