"""Scene → pixels. Masks and backgrounds are drawn once, supersampled, and then only pasted."""

from __future__ import annotations

import io
import itertools
import math
import random
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFilter

from vlp.data_tools.scenes.words import BACKGROUNDS, COLORS

SUPERSAMPLING = 8
# Of the diameter: an edge in a darker shade keeps white on tan and yellow on pink legible.
RIM = 0.06


def draw(scene: dict[str, Any], size: int) -> Image.Image:
    """The scene as an RGB picture of `size` × `size` pixels."""
    ground = scene["background"]
    # The canvas is twice as large; where it is cut belongs to the scene.
    x, y = (round(offset * size) for offset in ground["offset"])
    image = _background(ground["color"], ground["texture"], size).crop((x, y, x + size, y + size))

    for thing in scene["objects"]:
        diameter = round(thing["diameter"] * size)
        left = round(thing["x"] * size - diameter / 2)
        top = round(thing["y"] * size - diameter / 2)

        # The whole shape in the color of its rim, then the shape without its rim.
        color = COLORS[thing["color"]]
        rim = max(1, round(RIM * diameter))
        outer = _mask(thing["shape"], diameter, thing["angle"], 0)
        inner = _mask(thing["shape"], diameter, thing["angle"], rim)
        image.paste(_rim(color), (left, top), outer)
        image.paste(color, (left, top), inner)
    return image


def encode(image: Image.Image) -> bytes:
    """JPEG bytes: what most web data is, and the fastest of the formats to write. Chroma keeps its
    full resolution.
    """

    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _rim(color: tuple[int, int, int]) -> tuple[int, ...]:
    if max(color) < 64:
        return (96, 96, 100)  # black gets a lighter edge
    return tuple(round(0.5 * channel) for channel in color)


@cache
def _mask(shape: str, diameter: int, angle: int, rim: int) -> Image.Image:
    """Coverage of `shape` in a square of `diameter` pixels, without the outermost `rim` pixels of
    the shape.
    """
    # Drawn large and averaged at the end: Pillow's polygons have no soft edges of their own.
    side = diameter * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    pen.polygon([(side / 2 * (1 + x), side / 2 * (1 + y)) for x, y in _corners(shape)], fill=255)
    if shape == "ring":
        hole = 0.28 * side
        pen.ellipse((hole, hole, side - hole, side - hole), fill=0)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC)

    # The darkest of a neighbourhood: every edge moves inwards by the rim's width.
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
        return _cross()
    if shape == "heart":
        return _heart()
    raise ValueError(f"no outline for shape {shape!r}; add it to _corners")


def _cross() -> list[tuple[float, float]]:
    arm, end = 0.34, 0.92
    quarter = [(arm, -end), (arm, -arm), (end, -arm)]
    corners: list[tuple[float, float]] = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]  # a quarter turn
    return corners


def _heart() -> list[tuple[float, float]]:
    """The usual heart curve x = 16 sin³ a, y = 13 cos a − 5 cos 2a − 2 cos 3a − cos 4a, scaled."""
    corners = []
    for i in range(72):
        a = math.tau * i / 72
        height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        corners.append((16 / 17 * math.sin(a) ** 3, -(height + 2.5) / 16))
    return corners


def _polar(radii: list[float]) -> list[tuple[float, float]]:
    """Points at these radii, evenly turned clockwise from the top."""
    step = math.tau / len(radii)
    corners = []
    for i, radius in enumerate(radii):
        corners.append((radius * math.sin(i * step), -radius * math.cos(i * step)))
    return corners


@cache
def _background(color: str, texture: str, size: int) -> Image.Image:
    """A canvas of twice the picture's side, to be cropped anywhere."""
    base = BACKGROUNDS[color]
    dark = tuple(round(0.86 * channel) for channel in base)
    side = 2 * size
    if texture == "speckled":
        return _speckled(f"{color} {texture}", base, dark, size)

    canvas = Image.new("RGB", (side, side), base)
    pen = ImageDraw.Draw(canvas)
    cell = size / 8
    if texture == "striped":
        width = max(1, round(cell * 0.7))
        for i in range(-16, 16):
            start = i * cell * 2
            pen.line((start, side, start + side, 0), fill=dark, width=width)
        return canvas

    for column, row in itertools.product(range(16), range(16)):
        x, y = column * cell, row * cell
        is_odd = (column + row) % 2 == 1
        if texture == "checkered":
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=dark if is_odd else base)
        elif texture == "dotted" and is_odd:
            box = (x + 0.2 * cell, y + 0.2 * cell, x + 0.75 * cell, y + 0.75 * cell)
            pen.ellipse(box, fill=dark)
    return canvas


def _speckled(seed: str, base: tuple[int, ...], dark: tuple[int, ...], size: int) -> Image.Image:
    """Grains of a size that grows with the picture, the same for the same seed."""
    side = 2 * size
    noise = Image.frombytes("L", (side, side), random.Random(seed).randbytes(side * side))
    grain = noise.filter(ImageFilter.GaussianBlur(size / 100))

    # Blurring leaves little contrast; four times as much of it gives grains instead of a haze.
    strength = grain.point([max(0, min(255, 128 + 4 * (v - 128))) for v in range(256)])
    ground = Image.new("RGB", (side, side), base)
    return Image.composite(Image.new("RGB", (side, side), dark), ground, strength)
