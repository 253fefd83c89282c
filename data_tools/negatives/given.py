"""Negatives that a file gives: `--from` of `vlp data negatives`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_given(path: Path) -> tuple[dict[str, list[tuple[str, str]]], dict[str, Path]]:
    """Key → (negative, kind) pairs, and key → image of the first of them, of a table (JSONL, CSV
    with lists in JSON, …).

    Raises ValueError with the line of the first mistake.
    """
    from vlp.data import tables

    result: dict[str, list[tuple[str, str]]] = {}
    images: dict[str, Path] = {}
    table = tables.read(path)
    if table.problems:
        raise ValueError(table.problems[0])

    for (number, _), row in zip(table.rows, table.records(texts=("key", "image"))):
        place = table.place(number)
        if not _is_given(row):
            expected = (
                '{"key": "000000012", "negatives": ["…"], "kinds": ["…"], "image": "…"} '
                "(kinds and image may be left out)"
            )
            raise ValueError(f"{place}: found {json.dumps(row)[:100]}, expected {expected}")

        # Several lines may have one key; only the first may bring an image.
        key, texts = row["key"], row["negatives"]
        kinds = row.get("kinds", ["given"] * len(texts))
        if "image" in row:
            is_first = bool(texts) and key not in result
            images[key] = _image_of(row, path, number, place, is_first)
        result.setdefault(key, []).extend(zip(texts, kinds))
    if not result:
        raise ValueError(f"{path} holds no negatives")
    return result, images


def _is_given(row: dict[str, Any]) -> bool:
    """Whether a row has a key, as many negatives as kinds, and no image but a name."""
    texts = row.get("negatives")
    if not isinstance(row.get("key"), str) or not isinstance(texts, list):
        return False
    kinds = row.get("kinds", ["given"] * len(texts))
    if not isinstance(kinds, list) or len(kinds) != len(texts):
        return False
    if not all(isinstance(text, str) for text in texts + kinds):
        return False
    return isinstance(row.get("image", ""), str)


def _image_of(row: dict[str, Any], path: Path, number: int, place: str, is_first: bool) -> Path:
    """The image of a row's first negative; raises ValueError where it cannot be used as that."""
    from vlp.data.members import IMAGE_TYPES

    # A table from elsewhere must not pull any file of this machine into shards.
    image = path.parent / row["image"]
    if not image.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError(
            f"{path}:{number}: the image {row['image']!r} leads out of the folder of this file; "
            "copy it there"
        )

    is_image = image.is_file() and image.suffix.lower()[1:] in IMAGE_TYPES
    if not is_image or not is_first:
        types = ", ".join(sorted(IMAGE_TYPES))
        expected = f"a {types} file beside the first negatives of {row['key']!r}"
        raise ValueError(f"{place}: found the image {str(image)!r}, expected {expected}")
    return image
