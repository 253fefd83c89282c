"""Curves and scatter plots as inline SVG; colours and fonts come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlp.eval.report.markup import Html, number, tag

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24
MAX_POINTS = 240  # a curve has no more than this; a screen shows no more
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve of one run; `color` is the run's place on the page."""

    name: str
    points: Sequence[Point]
    color: int = 0


def curve(title: str, series: Sequence[Series], level: float | None = None) -> Html:
    """A card with curves over steps; `level` draws the chance level. Values that are not finite are
    left out.
    """
    clean = [Series(s.name, [p for p in s.points if math.isfinite(p[1])], s.color) for s in series]
    clean = [Series(s.name, downsampled(s.points), s.color) for s in clean if s.points]
    if not clean:
        return tag(
            "figure",
            tag("figcaption", title),
            tag("p", "no finite value", class_="note"),
            class_="card",
        )
    xs = [x for s in clean for x, _ in s.points]
    ys = [y for s in clean for _, y in s.points] + ([level] if level is not None else [])
    plot = _Plot(_domain(xs, 0), _domain(ys, 0.06))
    latest = clean[0].points[-1][1]
    drawing = tag(
        "svg",
        plot.axes(),
        plot.level(level),
        [plot.line(s) for s in reversed(clean)],
        class_="chart",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        data_x=_pair(plot.x),
        data_y=_pair(plot.y),
        data_box=f"{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM}",
        aria_label=f"{title} over steps, last {number(latest)}",
    )
    return tag("figure", tag("figcaption", title, tag("b", number(latest))), drawing, class_="card")


def scatter(pairs: Sequence[tuple[Point, Point, str]], names: tuple[str, str], key: str) -> Html:
    """Pairs of points joined by thin lines, on one scale both ways; a point's title is the pair's
    text.
    """
    size, edge = 360, 12
    xs, ys = [[p[axis] for a, b, _ in pairs for p in (a, b)] for axis in (0, 1)]
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2

    def at(p: Point) -> tuple[str, str]:
        x, y = ((p[i] - middle[i]) / span * (size - 2 * edge) for i in (0, 1))
        return f"{size / 2 + x:.1f}", f"{size / 2 - y:.1f}"

    links, dots = [], []
    for first, second, text in pairs:
        (x1, y1), (x2, y2) = at(first), at(second)
        links.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2))
        dots += [
            tag("circle", tag("title", text), cx=x, cy=y, r=2.6, class_=c)
            for x, y, c in ((x1, y1, "c0"), (x2, y2, "c1"))
        ]
    drawing = tag(
        "svg",
        tag("g", links, class_="links"),
        tag("g", dots),
        class_="scatter",
        viewBox=f"0 0 {size} {size}",
        role="img",
        aria_label=f"{len(pairs)} pairs of {names[0]} and {names[1]} embeddings in two dimensions",
    )
    legend = tag(
        "span",
        tag("i", class_="k0"),
        names[0],
        " ",
        tag("i", class_="k1"),
        names[1],
        class_="legend",
    )
    switch = tag(
        "label",
        tag("input", type="checkbox", checked="", id=key),
        " join pairs",
        class_="switch",
        for_=key,
    )
    return tag("div", switch, legend, drawing, class_="plot")


def bars(title: str, rows: Sequence[tuple[str, float]], said: str = "") -> Html:
    """A card with a bar for every (label, number); where labels would touch, every second, third, …
    is shown.
    """
    if not rows:
        return tag(
            "figure",
            tag("figcaption", title),
            tag("p", "nothing to count", class_="note"),
            class_="card",
        )
    plot = _Plot((0, len(rows)), (0, max(n for _, n in rows) or 1))
    floor, every = (
        HEIGHT - BOTTOM,
        -(-len(rows) * (8 + 6 * max(len(label) for label, _ in rows)) // (WIDTH - LEFT - RIGHT)),
    )
    drawn = []
    for i, (label, n) in enumerate(rows):
        (left, top), (right, _) = plot.at(i, n), plot.at(i + 1, n)
        shape = {"x": left + 1, "y": top, "width": max(right - left - 2, 1), "height": floor - top}
        shape = {name: f"{value:.1f}" for name, value in shape.items()}
        drawn.append(tag("rect", tag("title", f"{label}: {number(n)}"), class_="c0", **shape))
        if i % every == 0:
            drawn.append(
                tag(
                    "text", label, x=f"{(left + right) / 2:.1f}", y=HEIGHT - 7, text_anchor="middle"
                )
            )
    view = {
        "class_": "bars",
        "role": "img",
        "viewBox": f"0 0 {WIDTH} {HEIGHT}",
        "aria_label": title,
    }
    drawing = tag("svg", plot.axes(across=False), drawn, **view)
    return tag("figure", tag("figcaption", title, tag("b", said)), drawing, class_="card")


def downsampled(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: of each stretch its lowest and its highest, and both ends, so that no
    spike is lost.
    """
    if len(points) <= limit:
        return list(points)
    inner, n = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(n):
        stretch = inner[i * len(inner) // n : (i + 1) * len(inner) // n]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high})
    return [*kept, points[-1]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _domain(values: Sequence[float], margin: float) -> Point:
    low, high = min(values), max(values)
    room = (high - low) * margin or (abs(high) * 0.05 or 0.5) * (low == high)
    return low - room, high + room


def _pair(values: Point) -> str:
    return f"{values[0]:.9g} {values[1]:.9g}"


@dataclass(frozen=True)
class _Plot:
    x: Point
    y: Point

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (
            HEIGHT - TOP - BOTTOM
        )

    def axes(self, across: bool = True) -> list[Html]:
        drawn = []
        for value in ticks(*self.y):
            y = f"{self.at(self.x[0], value)[1]:.1f}"
            drawn.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
            drawn.append(
                tag("text", number(value), x=LEFT - 6, y=y, dy="0.32em", text_anchor="end")
            )
        for value in ticks(*self.x) if across else ():
            x = f"{self.at(value, self.y[0])[0]:.1f}"
            shown = f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
            drawn.append(tag("text", shown, x=x, y=HEIGHT - 7, text_anchor="middle"))
        return drawn

    def level(self, value: float | None) -> Html | None:
        if value is None:
            return None
        y = f"{self.at(self.x[0], value)[1]:.1f}"
        return tag(
            "line",
            tag("title", f"chance {number(value)}"),
            x1=LEFT,
            x2=WIDTH - RIGHT,
            y1=y,
            y2=y,
            class_="chance",
        )

    def line(self, series: Series) -> Html:
        spots = [self.at(*p) for p in series.points]
        drawn = [
            tag(
                "polyline",
                points=" ".join(f"{x:.1f},{y:.1f}" for x, y in spots),
                data_name=series.name,
            )
        ]
        if len(spots) <= 12:  # few enough to be single events, such as evaluations
            drawn += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4) for x, y in spots]
        return tag("g", drawn, class_=f"s{series.color}")
