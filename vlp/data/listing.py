"""Items with the stored names of their pictures: what `vlp data pack` and the sources do between a
table and its images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from vlp.data.archives import Archive
from vlp.data.tables import Item, join

Named = tuple[Item, str]  # an item, and the stored name of its picture


def settle(named: Sequence[Named], archive: Archive) -> tuple[list[Named], list[str]]:
    """One item for each picture, and a line for each name that contradicts a better one of the same
    picture.

    Several spellings of one name (`a/1.jpg`, `./a/1.jpg`) are one item with the captions of all. A
    name whose folders differ from the stored ones (`train/1.jpg` for `val/1.jpg`) is refused where
    another name means that picture too.
    """
    by_picture: dict[str, list[Item]] = defaultdict(list)
    for item, name in named:
        by_picture[name].append(item)

    settled: list[Named] = []
    problems: list[str] = []
    for name, items in by_picture.items():
        # A lone name may differ in its folders: tables are written on other machines.
        agreeing = [item for item in items if len(items) == 1 or archive.agrees(item.image, name)]
        for item in items:
            if item not in agreeing:
                owner = repr(agreeing[0].image) if agreeing else "another name"
                problems.append(
                    f"image {item.image!r} is missing in {archive.path}; {name!r} is that of "
                    f"{owner}"
                )
        if not agreeing:
            continue

        # The first one's row gives the JSON; the others add their captions.
        first, *others = agreeing
        for other in others:
            contradiction = join(first, other)
            if contradiction:
                problems.append(contradiction)
        settled.append((first, name))
    return settled, problems


def families(named: Sequence[Named]) -> list[list[Named]]:
    """The items of one "origin" together, each family where its first member stands; others are
    alone."""
    result: dict[str, list[Named]] = {}
    for number, (item, name) in enumerate(named):
        origin = item.meta.get("origin")
        # A number keeps those without an origin apart from each other.
        family = f"alone {number}" if origin is None else f"origin {origin!r}"
        result.setdefault(family, []).append((item, name))

    return list(result.values())
