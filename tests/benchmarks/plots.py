"""A drawing of lines and points on two logarithmic axes, as an SVG that stands alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 380, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 44
# Told apart by people with the common kinds of colour blindness (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
ACROSS, DOWN = (1, 2, 3, 5), (1, 2, 3, 4, 5, 6, 8)  # times powers of ten


@dataclass(frozen=True)
class Mark:
    """A point; with `low` and `high` a bar from the one to the other."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    is_hollow: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one colour, and a line of its own."""

    name: str
    marks: Sequence[Mark]
    line: Sequence[tuple[float, float]] = ()
    is_dashed: bool = False  # the line


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its series."""

    title: str
    x_name: str
    series: Sequence[Series]
    y_is_share: bool = True  # labelled in %


def drawing(panels: Sequence[Panel], description: str) -> str:
    """The panels beside one another; ValueError for a value that has no logarithm."""
    width = WIDTH * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" '
        f'width="{width}" height="{HEIGHT}" role="img" font-family="sans-serif" font-size="11">',
        f"<title>{escape(description)}</title>",
        # Of its own, because a page may be dark.
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        parts.append(f'<g transform="translate({place * WIDTH} 0)">')
        parts += _panel(panel)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    xs, ys = _values(panel)
    if min(*xs, *ys) <= 0:
        raise ValueError(f"{panel.title}: a logarithmic axis has no place for {min(*xs, *ys)}")

    # A little room, so that no point lies on the frame.
    across = _axis(min(xs) / 1.15, max(xs) * 1.15, LEFT, WIDTH - RIGHT)
    down = _axis(min(ys) / 1.08, max(ys) * 1.08, HEIGHT - BOTTOM, TOP)
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts = [
        f'<text x="{LEFT}" y="16" font-weight="bold">{escape(panel.title)}</text>',
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.x_name)}</text>',
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" '
        f'height="{HEIGHT - BOTTOM - TOP}" fill="none" stroke="#999"/>',
    ]
    parts += _ticks(panel, xs, ys, across, down)
    for place, one in enumerate(panel.series):
        parts += _series(one, COLORS[place % len(COLORS)], across, down)
        legend = TOP + 14 + 14 * place
        color = COLORS[place % len(COLORS)]
        parts.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{legend}" text-anchor="end" fill="{color}">'
            f"{escape(one.name)}</text>"
        )
    return parts


def _values(panel: Panel) -> tuple[list[float], list[float]]:
    """Every x and every y that is drawn."""
    xs, ys = [], []
    for one in panel.series:
        for mark in one.marks:
            xs.append(mark.x)
            ys += [y for y in (mark.y, mark.low, mark.high) if y is not None]
        xs += [x for x, _ in one.line]
        ys += [y for _, y in one.line]
    return xs, ys


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """From a value to its place."""
    span = math.log(high / low)
    return lambda value: start + (end - start) * math.log(value / low) / span


def _ticks(
    panel: Panel,
    xs: list[float],
    ys: list[float],
    across: Callable[[float], float],
    down: Callable[[float], float],
) -> list[str]:
    parts = []
    for value in _round_values(ACROSS, min(xs) / 1.15, max(xs) * 1.15):
        x = f"{across(value):.1f}"
        label = f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
        y = HEIGHT - BOTTOM
        parts.append(f'<path d="M{x} {y}v4" stroke="#999"/>')
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{label}</text>')
    for value in _round_values(DOWN, min(ys) / 1.08, max(ys) * 1.08):
        y = f"{down(value):.1f}"
        label = f"{100 * value:g} %" if panel.y_is_share else f"{value:g}"
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#eee"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y}" dy="4" text-anchor="end">{label}</text>')
    return parts


def _round_values(digits: Sequence[int], low: float, high: float) -> list[float]:
    """These digits times the powers of ten, between two values."""
    values: list[float] = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        values += [digit * 10.0**power for digit in digits]
    return [value for value in values if low <= value <= high]


def _series(
    one: Series, color: str, across: Callable[[float], float], down: Callable[[float], float]
) -> list[str]:
    parts = []
    if one.line:
        places = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in one.line)
        dash = ' stroke-dasharray="4 3"' if one.is_dashed else ""
        parts.append(f'<polyline points="{places}" fill="none" stroke="{color}"{dash}/>')
    for mark in one.marks:
        x, y = f"{across(mark.x):.1f}", f"{down(mark.y):.1f}"
        if mark.low is not None and mark.high is not None:
            bar = f"M{x} {down(mark.low):.1f}V{down(mark.high):.1f}"
            parts.append(f'<path d="{bar}" stroke="{color}" stroke-width="2" opacity="0.5"/>')
        fill = "white" if mark.is_hollow else color
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{fill}" stroke="{color}">'
            f"<title>{escape(mark.hint)}</title></circle>"
        )
    return parts
