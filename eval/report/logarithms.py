"""A chart of points and lines on two logarithmic axes, for powers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlp.eval.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Plot,
    Point,
    color_class,
    domain,
)
from vlp.eval.report.markup import Html, number, tag

DIGITS = (1, 2, 5)  # times powers of ten: where an axis has its numbers
ALL_DIGITS = (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)  # of axes that span less


@dataclass(frozen=True)
class Powers:
    """Points of one colour with their hints, and a line of its own; all numbers above 0."""

    name: str
    points: Sequence[tuple[float, float, str]]
    line: Sequence[Point] = ()


def powers(title: str, series: Sequence[Powers], across: str, remark: str = "") -> Html:
    """A card with every series; `across` names what lies across, `remark` stands below."""
    spots: list[Point] = []
    for one in series:
        spots += [(x, y) for x, y, _ in one.points]
        spots += one.line
    plot = Plot(
        domain([math.log10(x) for x, _ in spots], 0.06),
        domain([math.log10(y) for _, y in spots], 0.08),
    )

    drawing = tag(
        "svg",
        _axes(plot),
        [_drawn(one, color, plot) for color, one in enumerate(series)],
        class_="plane",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_label=f"{title} against {across}, both logarithmic",
    )
    below = tag("p", f"Across {across}. {remark}", class_="small")
    return tag("figure", tag("figcaption", title), drawing, below, class_="card")


def _axes(plot: Plot) -> list[Html]:
    drawn = []
    for value in round_values(*plot.y):
        y = f"{plot.at(plot.x[0], math.log10(value))[1]:.1f}"
        drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        drawn.append(
            tag("text", f"{100 * value:g}%", x=LEFT - 6, y=y, dy="0.32em", text_anchor="end")
        )
    for value in round_values(*plot.x):
        x = f"{plot.at(math.log10(value), plot.y[0])[0]:.1f}"
        drawn.append(tag("text", _short(value), x=x, y=HEIGHT - BOTTOM + 17, text_anchor="middle"))
    return drawn


def round_values(low: float, high: float) -> list[float]:
    """Round numbers between 10^low and 10^high, two or more where there are such."""
    for digits in (DIGITS, ALL_DIGITS):
        values: list[float] = []
        for power in range(math.floor(low), math.ceil(high) + 1):
            values += [digit * 10.0**power for digit in digits]
        inside = [value for value in values if low <= math.log10(value) <= high]
        if len(inside) >= 2:
            return inside
    return inside


def _short(value: float) -> str:
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{sign}"
    return f"{value:g}"


def _drawn(one: Powers, color: int, plot: Plot) -> Html:
    """The line, and the points on it."""
    shapes = []
    if one.line:
        places = [plot.at(math.log10(x), math.log10(y)) for x, y in one.line]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        shapes.append(tag("polyline", points=path))
    for x, y, hint in one.points:
        left, top = plot.at(math.log10(x), math.log10(y))
        title = tag("title", f"{one.name}, {hint}: {number(100 * y)}%")
        shapes.append(tag("circle", title, cx=f"{left:.1f}", cy=f"{top:.1f}", r=3))
    return tag("g", shapes, class_=color_class("s", color))
