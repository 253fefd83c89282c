"""What was measured of certainties: JSON, a page, lines for a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlp.files import write_atomically

WAYS = {"text_retrieval": "text of an image", "image_retrieval": "image of a text"}


def new_folder(text: str) -> Path:
    """The folder to write into, wherever it lies; ValueError where something is in it."""
    from vlp.data.stored import destination

    folder = destination(text)
    # The lock of this call begins with a dot.
    if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"--to {text} is a folder that is not empty; name another one")
    return folder


def write(folder: Path, source: str, measured: dict[str, Any]) -> None:
    """certainty.json and certainty.html."""
    content = json.dumps(measured, indent=1)
    write_atomically(folder / "certainty.json", content.encode())
    write_atomically(folder / "certainty.html", page(source, measured).encode())


def page(source: str, measured: dict[str, Any]) -> str:
    """The curves as one HTML page that loads nothing."""
    from vlp.eval.report import charts, markup
    from vlp.privacy import private

    cards = []
    for way, title in WAYS.items():
        points = [
            (100 * share, value)
            for share, value in zip(measured["shares"], measured[way]["recall@1_of_share"])
        ]
        series = [charts.Series(way, points[::-1])]
        cards.append(charts.curve(f"R@1, {title}, over the percentage kept", series, over="% kept"))

    rows = [
        (title, f"{measured[way]['spearman']:.2f}", _shown(measured[way]["recall@1_by_bin"]))
        for way, title in WAYS.items()
    ]
    head = ("", "Spearman", "R@1 by bin, the least certain first")
    sections = [
        markup.section("kept", "R@1 over the share kept", markup.tag("div", cards, class_="cards")),
        markup.section("bins", "By certainty", markup.table(head, rows)),
    ]
    return markup.page(private(source), sections, "vlp data certainty")


def text(folder: Path, measured: dict[str, Any]) -> str:
    """Lines for a terminal."""
    lines = [
        f"{folder}: adapter.safetensors, certainty.json, certainty.html; trained on "
        f"{measured['trained']:,} pairs, measured on {measured['held_out']:,}"
    ]
    for way, title in WAYS.items():
        of_way = measured[way]
        by_share = dict(zip(measured["shares"], of_way["recall@1_of_share"]))
        lines.append(
            f"  R@1, {title}: {by_share[1.0]:.1%} of all, {by_share[0.5]:.1%} of the more certain "
            f"half, {by_share[0.1]:.1%} of the tenth; Spearman {of_way['spearman']:.2f}"
        )
    return "\n".join(lines)


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.1%}" for value in values)
