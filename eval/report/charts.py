"""Curves and scatter plots as inline SVG; colours and fonts come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from vlp.eval.report.markup import Html, number, tag

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 24
SCATTER_SIDE, SCATTER_EDGE = 360, 12
COLORS = 4  # of the page's style
MAX_POINTS = 240  # a curve has no more than this; a screen shows no more
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve of one run; `color` is the run's place on the page, of which four differ."""

    name: str
    points: Sequence[Point]
    color: int = 0


def color_class(kind: str, place: int) -> str:
    """The class of what is drawn in a place's color, kind s, or of its key, kind k.

    Beyond the colors that there are lines are dashed and keys are rings: no two of eight are alike.
    """
    again = " again" if (place // COLORS) % 2 else ""
    return f"{kind}{place % COLORS}{again}"


# --- curves ---------------------------------------------------------------------------------------


def curve(
    title: str, series: Sequence[Series], level: float | None = None, over: str = "step"
) -> Html:
    """A card with curves over steps, or over what `over` names; `level` draws the chance level.
    Values that are not finite are left out.
    """
    drawn = _drawable(series)
    if not drawn:
        return empty_card(title, "no finite value")

    # One scale for all runs, with some room above and below; chance is always inside.
    points = list(chain.from_iterable(one.points for one in drawn))
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    if level is not None:
        ys.append(level)
    plot = Plot(domain(xs, 0), domain(ys, 0.06))

    latest = drawn[0].points[-1][1]
    drawing = tag(
        "svg",
        plot.axes(),
        plot.level(level),
        [plot.line(one) for one in reversed(drawn)],  # the first run on top
        class_="chart",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        data_x=_pair(plot.x),
        data_y=_pair(plot.y),
        data_box=f"{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM}",
        data_over=over,
        aria_label=f"{title} over {over}, last {number(latest)}",
    )
    return tag("figure", tag("figcaption", title, tag("b", number(latest))), drawing, class_="card")


def _drawable(series: Sequence[Series]) -> list[Series]:
    """The series that have finite values, with as many of those as a screen shows."""
    drawable = []
    for one in series:
        finite = [point for point in one.points if math.isfinite(point[1])]
        if finite:
            drawable.append(Series(one.name, downsampled(finite), one.color))
    return drawable


def empty_card(title: str, reason: str) -> Html:
    """A card that says why there is nothing to draw."""
    return tag("figure", tag("figcaption", title), tag("p", reason, class_="note"), class_="card")


def downsampled(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: of each stretch its lowest and its highest, and both ends, so that no
    spike is lost.
    """
    if len(points) <= limit:
        return list(points)

    def value(point: Point) -> float:
        return point[1]

    inner, n = points[1:-1], (limit - 2) // 2
    kept = [points[0]]
    for i in range(n):
        stretch = inner[i * len(inner) // n : (i + 1) * len(inner) // n]
        kept += sorted({min(stretch, key=value), max(stretch, key=value)})
    return [*kept, points[-1]]


# --- scatter and bars -----------------------------------------------------------------------------


def scatter(pairs: Sequence[tuple[Point, Point, str]], names: tuple[str, str], key: str) -> Html:
    """Pairs of points joined by thin lines, on one scale both ways; a point's title is the pair's
    text.
    """
    points = [first for first, _, _ in pairs] + [second for _, second, _ in pairs]

    # One scale for both axes: distances in the plot mean the same in every direction.
    at = _square(points)
    links, dots = [], []
    for first, second, text in pairs:
        (x1, y1), (x2, y2) = at(first), at(second)
        hint = tag("title", text)
        links.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2))
        dots.append(tag("circle", hint, cx=x1, cy=y1, r=2.6, class_="c0"))
        dots.append(tag("circle", hint, cx=x2, cy=y2, r=2.6, class_="c1"))

    # Lines first: what is drawn later lies on top.
    drawing = tag(
        "svg",
        tag("g", links, class_="links"),
        tag("g", dots),
        class_="scatter",
        viewBox=f"0 0 {SCATTER_SIDE} {SCATTER_SIDE}",
        role="img",
        aria_label=f"{len(pairs)} pairs of {names[0]} and {names[1]} embeddings in two dimensions",
    )
    first_key, second_key = tag("i", class_="k0"), tag("i", class_="k1")
    legend = tag("span", first_key, names[0], " ", second_key, names[1], class_="legend")
    box = tag("input", type="checkbox", checked="", id=key)
    switch = tag("label", box, " join pairs", class_="switch", for_=key)
    return tag("div", switch, legend, drawing, class_="plot")


def _square(points: Sequence[Point]) -> Callable[[Point], tuple[str, str]]:
    """A function from a point to its place in the scatter's square, as texts (x, y)."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = min(xs), max(xs)
    bottom, top = min(ys), max(ys)
    # Points that are all the same lie in the middle.
    span = max(right - left, top - bottom) or 1.0
    room = SCATTER_SIDE - 2 * SCATTER_EDGE
    middle_x = (right + left) / 2
    middle_y = (top + bottom) / 2

    def at(point: Point) -> tuple[str, str]:
        x = (point[0] - middle_x) / span * room
        y = (point[1] - middle_y) / span * room
        # Down is positive in SVG.
        across = SCATTER_SIDE / 2 + x
        down = SCATTER_SIDE / 2 - y
        return f"{across:.1f}", f"{down:.1f}"

    return at


def bars(title: str, rows: Sequence[tuple[str, float]], total: str = "") -> Html:
    """A card with a bar for every (label, number); where labels would touch, every second, third, …
    is shown. `total` stands beside the title.
    """
    if not rows:
        return empty_card(title, "nothing to count")

    highest = max(value for _, value in rows)
    plot = Plot((0, len(rows)), (0, highest or 1))
    floor = HEIGHT - BOTTOM

    # A letter is about six pixels wide, and labels need a gap.
    label_width = 8 + 6 * max(len(label) for label, _ in rows)
    every = -(-len(rows) * label_width // (WIDTH - LEFT - RIGHT))
    drawn = []
    for i, (label, value) in enumerate(rows):
        left, top = plot.at(i, value)
        right, _ = plot.at(i + 1, value)
        shape = {
            "x": left + 1,
            "y": top,
            "width": max(right - left - 2, 1),  # a pixel between bars
            "height": floor - top,
        }
        attributes = {name: f"{length:.1f}" for name, length in shape.items()}
        hint = tag("title", f"{label}: {number(value)}")
        drawn.append(tag("rect", hint, class_="c0", **attributes))
        if i % every == 0:
            middle = f"{(left + right) / 2:.1f}"
            drawn.append(tag("text", label, x=middle, y=HEIGHT - 7, text_anchor="middle"))

    drawing = tag(
        "svg",
        plot.axes(across=False),
        drawn,
        class_="bars",
        role="img",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        aria_label=title,
    )
    return tag("figure", tag("figcaption", title, tag("b", total)), drawing, class_="card")


# --- axes -----------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    # A thousandth and a billionth off: rounding must not skip a tick that is just reached.
    round_steps = [factor * power for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in round_steps if step >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def domain(values: Sequence[float], margin: float) -> Point:
    """The range of the values with a margin; of one value a range around it."""
    low, high = min(values), max(values)
    room = (high - low) * margin
    if low == high:
        room = abs(high) * 0.05 or 0.5
    return low - room, high + room


def _pair(values: Point) -> str:
    """Two numbers as the page's script reads them."""
    return f"{values[0]:.9g} {values[1]:.9g}"


@dataclass(frozen=True)
class Plot:
    """The plane of a chart: the values at its edges, and what is drawn on it."""

    x: Point
    y: Point

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies, in pixels."""
        x_low, x_high = self.x
        y_low, y_high = self.y
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        # Down is positive in SVG.
        left = LEFT + across * (WIDTH - LEFT - RIGHT)
        top = HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)
        return left, top

    def axes(self, across: bool = True) -> list[Html]:
        """Lines and numbers up, and numbers across unless the bars have labels."""
        drawn = []
        for value in ticks(*self.y):
            y = f"{self.at(self.x[0], value)[1]:.1f}"
            grid_line = tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
            drawn.append(grid_line)
            label = tag(
                "text",
                number(value),
                x=LEFT - 6,
                y=y,
                dy="0.32em",
                text_anchor="end",
            )
            drawn.append(label)

        if not across:
            return drawn
        for value in ticks(*self.x):
            x = f"{self.at(value, self.y[0])[0]:.1f}"
            shown = f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
            drawn.append(tag("text", shown, x=x, y=HEIGHT - 7, text_anchor="middle"))
        return drawn

    def level(self, value: float | None) -> Html | None:
        """A dashed line at chance."""
        if value is None:
            return None
        y = f"{self.at(self.x[0], value)[1]:.1f}"
        hint = tag("title", f"chance {number(value)}")
        return tag("line", hint, x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="chance")

    def line(self, series: Series) -> Html:
        """A curve, with dots where its points are few enough to be single events, such as
        evaluations.
        """
        spots = [self.at(*point) for point in series.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        drawn = [tag("polyline", points=path, data_name=series.name)]
        if len(spots) <= 12:
            drawn += [tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4) for x, y in spots]
        return tag("g", drawn, class_=color_class("s", series.color))
