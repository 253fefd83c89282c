"""Scene → pixels. Masks and backgrounds are drawn once, supersampled, and then only pasted."""

from __future__ import annotations

import io
import math
import random
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from vlp.data_tools.scenes.words import BACKGROUNDS, COLORS

SUPERSAMPLING = 8
RIM = (
    0.06  # of the diameter: an edge in a darker shade keeps white on tan and yellow on pink legible
)


def draw(scene: dict[str, Any], size: int) -> Image.Image:
    """The scene as an RGB picture of `size` × `size` pixels."""
    ground = scene["background"]
    x, y = (round(offset * size) for offset in ground["offset"])
    image = _background(ground["color"], ground["texture"], size).crop((x, y, x + size, y + size))
    for item in scene["objects"]:
        diameter = round(item["diameter"] * size)
        corner = (round(item["x"] * size - diameter / 2), round(item["y"] * size - diameter / 2))
        fill = COLORS[item["color"]]
        image.paste(_rim(fill), corner, _mask(item["shape"], diameter, item["angle"], 0))
        image.paste(
            fill,
            corner,
            _mask(item["shape"], diameter, item["angle"], max(1, round(RIM * diameter))),
        )
    return image


def encode(image: Image.Image) -> bytes:
    """JPEG bytes: what most web data is, and the fastest of the formats to write. Chroma keeps its
    full resolution.
    """
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _rim(color: tuple[int, int, int]) -> tuple[int, ...]:
    return (
        (96, 96, 100) if max(color) < 64 else tuple(round(0.5 * c) for c in color)
    )  # black gets a lighter edge


@cache
def _mask(shape: str, diameter: int, angle: int, rim: int) -> Image.Image:
    """Coverage of `shape` in a square of `diameter` pixels, without the outermost `rim` pixels of
    the shape.
    """
    side = diameter * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(side / 2 * (1 + x), side / 2 * (1 + y)) for x, y in _corners(shape)], fill=255)
    if shape == "ring":
        hole = 0.28 * side
        pen.ellipse((hole, hole, side - hole, side - hole), fill=0)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC)
    if rim:
        mask = mask.filter(ImageFilter.MinFilter(2 * (rim * SUPERSAMPLING // 2) + 1))
    return mask.resize((diameter, diameter), Image.Resampling.BOX)


def _corners(shape: str) -> list[tuple[float, float]]:
    """The outline of `shape` as a polygon in [−1, 1]², y downwards."""
    if shape in ("circle", "ring"):
        return _polar([1.0] * 72)
    if shape == "star":
        return _polar([1.0, 0.45] * 5)
    if shape == "diamond":
        return [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]
    if shape == "square":
        return [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    if shape == "triangle":
        return [(0, -0.95), (0.97, 0.75), (-0.97, 0.75)]
    if shape == "cross":
        arm, end = 0.34, 0.92
        quarter = [(arm, -end), (arm, -arm), (end, -arm)]
        turns = [
            lambda x, y: (x, y),
            lambda x, y: (-y, x),
            lambda x, y: (-x, -y),
            lambda x, y: (y, -x),
        ]
        return [turn(x, y) for turn in turns for x, y in quarter]
    if shape == "heart":
        wave = [math.tau * i / 72 for i in range(72)]
        height = [
            13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
            for a in wave
        ]
        return [(16 / 17 * math.sin(a) ** 3, -(h + 2.5) / 16) for a, h in zip(wave, height)]
    raise ValueError(f"no outline for shape {shape!r}; add it to _corners")


def _polar(radii: list[float]) -> list[tuple[float, float]]:
    """Points at these radii, evenly turned clockwise from the top."""
    step = math.tau / len(radii)
    return [(r * math.sin(i * step), -r * math.cos(i * step)) for i, r in enumerate(radii)]


@cache
def _background(color: str, texture: str, size: int) -> Image.Image:
    """A canvas of twice the picture's side, to be cropped anywhere."""
    base = BACKGROUNDS[color]
    dark = tuple(round(0.86 * c) for c in base)
    side = 2 * size
    if texture == "speckled":
        dice = random.Random(f"{color} {texture}").randbytes(side * side)
        grain = Image.frombytes("L", (side, side), dice).filter(
            ImageFilter.GaussianBlur(size / 100)
        )
        strength = grain.point(lambda v: max(0, min(255, 128 + 4 * (v - 128))))
        return Image.composite(
            Image.new("RGB", (side, side), dark), Image.new("RGB", (side, side), base), strength
        )
    canvas = Image.new("RGB", (side, side), base)
    pen = ImageDraw.Draw(canvas)
    cell = size / 8
    cells = [
        (column * cell, row * cell, (column + row) % 2) for column in range(16) for row in range(16)
    ]
    if texture == "striped":
        for i in range(-16, 16):
            pen.line(
                (i * cell * 2, side, i * cell * 2 + side, 0),
                fill=dark,
                width=max(1, round(cell * 0.7)),
            )
    elif texture == "checkered":
        for x, y, odd in cells:
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=dark if odd else base)
    elif texture == "dotted":
        for x, y, odd in cells:
            if odd:
                pen.ellipse(
                    (x + 0.2 * cell, y + 0.2 * cell, x + 0.75 * cell, y + 0.75 * cell), fill=dark
                )
    return canvas
