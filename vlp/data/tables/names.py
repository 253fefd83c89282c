"""Lists of image names, such as Flickr_8k.trainImages.txt: they choose among a table's images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data.tables.columns import TableOptions, column, names_image
from vlp.data.tables.read import read

if TYPE_CHECKING:
    from vlp.data.tables.items import Item

_SAMPLED = 20  # rows that are looked at to find the column of images


def only(items: Iterable[Item], path: str | Path) -> tuple[list[Item], list[str]]:
    """The items that a list names, and the names that mean no item.

    The list holds one name a line (or is a table with a column of images). A name means an image if
    one is the end of the other, whole folders at a time, with or without an extension. Raises
    ValueError, OSError.
    """
    # By the last part, so that each image is compared with few names.
    wanted: dict[str, list[tuple[str, ...]]] = {}
    for name in _listed(Path(path)):
        parts = _parts(name)
        wanted.setdefault(parts[-1], []).append(parts)

    chosen_items: list[Item] = []
    used_names: set[tuple[str, ...]] = set()
    for item in items:
        parts = _parts(item.image)
        agreeing = [other for other in wanted.get(parts[-1], ()) if _agree(parts, other)]
        if agreeing:
            chosen_items.append(item)
            used_names.update(agreeing)

    listed = chain.from_iterable(wanted.values())
    lost = ["/".join(parts) for parts in listed if parts not in used_names]
    return chosen_items, lost


def _listed(path: Path) -> list[str]:
    """The names in the file."""
    table = read(path, TableOptions())
    if len(table.columns) == 1:
        header = table.columns[0]
        names = [row[header] for _, row in table.rows]
        # Names without extensions: the first line is one of them, unless it says what the column
        # is.
        is_title = header.lower() in ("image", "file_name", "filename")
        return names if is_title or names_image(names[0]) else [header, *names]

    sample = [row for _, row in table.rows[:_SAMPLED]]
    image_columns = [
        name for name in table.columns if any(names_image(row.get(name)) for row in sample)
    ]
    if len(image_columns) == 1:
        [name] = image_columns
        return [row[name] for _, row in table.rows if row.get(name)]
    name = column(table.columns, "image", path)
    return [row[name] for _, row in table.rows]


def _parts(name: str) -> tuple[str, ...]:
    """Folders and name without extension."""
    path = name.strip().replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    *folders, last = parts or [""]
    stem = last.rsplit(".", 1)[0] if names_image(last) else last
    return (*folders, stem)


def _agree(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shorter, longer = sorted([one, other], key=len)
    end_of_longer = longer[-len(shorter) :]
    return end_of_longer == shorter
