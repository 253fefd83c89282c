"""What scenes are made of and which combinations training never shows. Plain data and pure
functions.
"""

from __future__ import annotations

import zlib
from typing import Any

COLORS = {
    "red": (214, 40, 40),
    "orange": (250, 140, 25),
    "yellow": (252, 222, 50),
    "green": (38, 158, 70),
    "blue": (40, 95, 220),
    "purple": (142, 62, 178),
    "white": (252, 252, 252),
    "black": (24, 24, 26),
}
SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "cross": "crosses",
    "diamond": "diamonds",
    "ring": "rings",
}
# Diameter as a share of the picture's side. Large objects come in groups of four at most, small
# ones in any number.
SIZES = {"small": (0.185, 0.215), "large": (0.33, 0.40)}
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COUNTED = range(2, 11)  # the numbers that counting captions exchange: all of them take the plural
BACKGROUNDS = {
    "gray": (146, 148, 152),
    "tan": (206, 184, 148),
    "teal": (104, 148, 148),
    "pink": (226, 184, 192),
    "brown": (128, 100, 80),
}
TEXTURES = ["plain", "striped", "checkered", "dotted", "speckled"]
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

# Held out from training: one color a shape (each color once), and one shape for every number from
# two to ten.
HELDOUT_KINDS = frozenset((color, list(SHAPES)[(3 * i + 1) % 8]) for i, color in enumerate(COLORS))
HELDOUT_COUNTS = frozenset((n, list(SHAPES)[(3 * n + 2) % 8]) for n in COUNTED)
KINDS = [(color, shape) for color in COLORS for shape in SHAPES]
TRAINED_KINDS = [kind for kind in KINDS if kind not in HELDOUT_KINDS]


def class_name(kind: tuple[str, str]) -> str:
    """The zero-shot class of a color and shape, in the plural: "red circles"."""
    return f"{kind[0]} {SHAPES[kind[1]]}"


def heldout(groups: list[dict[str, Any]]) -> list[str]:
    """The combinations among `groups` that training never shows, in words; empty for a scene that
    training could show.
    """

    # A scene may hold several; all are named, for a report to tell them apart.
    kinds, counts = [], []
    for group in groups:
        count, color, shape = group["count"], group["color"], group["shape"]
        if (color, shape) in HELDOUT_KINDS:
            kinds.append(f"{color} {shape}")
        if (count, shape) in HELDOUT_COUNTS:
            counts.append(f"{count} {SHAPES[shape]}")
    return kinds + counts


def side_of(background: dict[str, Any], groups: list[dict[str, Any]], relation: str | None) -> str:
    """ "train", "val" or "test": every description of a scene belongs to one of them for good, by
    its hash.

    So no evaluation picture has the same background, groups and relation as any training picture,
    whatever the seed.
    """
    parts = [f"{g['count']} {g['size']} {g['color']} {g['shape']}" for g in groups]
    text = "|".join([background["color"], background["texture"], *parts, relation or ""])
    return {0: "test", 1: "test", 2: "val"}.get(zlib.crc32(text.encode()) % 16, "train")
