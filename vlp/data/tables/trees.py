"""A tree with one folder a class, as items."""

from __future__ import annotations

from vlp.data.archives import Archive
from vlp.data.tables.items import Item


def class_items(archive: Archive) -> tuple[list[Item], list[str]]:
    """The images of a class-per-folder tree, and its classes, sorted. A folder's underscores are
    spaces in its class.
    """
    loose = [name for name in archive.names if "/" not in name]
    if loose or not archive.names:
        found = f"it holds {loose[0]!r} outside of any" if loose else "it holds no images"
        raise ValueError(
            f"{archive.path} is no tree with one folder a class: {found}; name a table of captions instead"
        )
    found = [
        Item(name, 0, [], {"image": name, "class": name.split("/")[0].replace("_", " ").strip()})
        for name in archive.names
    ]
    return found, sorted({item.meta["class"] for item in found})
