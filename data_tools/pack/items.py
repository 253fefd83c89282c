"""Which images are packed: the rows of the table, and those of the chosen part."""

from __future__ import annotations

import argparse
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named
    from vlp.data.tables import Item, Listing


def items_in_part(items: list[Item], args: argparse.Namespace) -> list[Item]:
    """The items of the parts that --part names; raises ValueError where none is left."""
    if args.part:
        # By origin where there is one: a family split between parts would leak into the test set.
        origins = [str(item.meta.get("origin", item.image)) for item in items]
        items = [item for item, origin in zip(items, origins) if _in_part(origin, args.part)]
    if not items:
        raise ValueError(
            f"no row of {args.captions or args.source} is left to pack; check --where and --part"
        )
    return items


def _in_part(name: str, part: str) -> bool:
    """Whether a name belongs to the parts "K,…/N": the same split of a set in every call and on
    every machine.
    """
    chosen, _, total = part.partition("/")
    numbers = chosen.split(",")
    is_valid = total.isdecimal() and all(
        number.isdecimal() and 1 <= int(number) <= int(total) for number in numbers
    )
    if not is_valid:
        raise ValueError(
            f"--part {part!r} is not of the form K/N with 1 <= K <= N, such as 3/3 or 1,2/3"
        )

    # A checksum, because Python's hash of a text differs from process to process.
    checksum = zlib.crc32(name.encode("utf-8", "surrogateescape"))
    return str(checksum % int(total) + 1) in numbers


def read_table(args: argparse.Namespace) -> Listing:
    """The images of the table, after saying which of its columns were taken."""
    from vlp.data.tables import TableOptions, items

    # Conditions on one column are alternatives, those on several all hold.
    where: dict[str, list[str]] = {}
    for condition in args.where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise ValueError(f"--where {condition!r} is not of the form COLUMN=VALUE")
        where.setdefault(column, []).append(value)

    options = TableOptions(
        image_column=args.image_column,
        caption_columns=args.caption_column,
        class_column=args.class_column,
        where=where,
        rows=args.rows,
        only=args.only,
        separator=args.separator,
        encoding=args.encoding,
        quoting=args.quoting,
        header={"yes": True, "no": False}.get(args.header),
    )

    listing = items(args.captions, options)
    print(f"{args.captions}: {listing}")
    for note in listing.notes:
        print(f"note: {note}")
    return listing


def sort_out(
    items: list[Item], archive: Archive, listing: Listing | None
) -> tuple[list[Named], dict[str, list[str]]]:
    """The items with the names of their images, and by reason a line for each row that cannot be
    packed.
    """
    named: list[Named] = []
    unreadable = list(listing.problems) if listing else []
    missing: list[str] = []
    silent: list[str] = []
    for item in items:
        place = f"{listing.place(item)}: " if listing else ""
        # Tables write names with other folders, endings and capitals than the disk has.
        name = archive.find(item.image)
        if name is None:
            why = archive.why_not(item.image)
            # Under the last part of its name it would have been found.
            if item.image.startswith(("http://", "https://")):
                why += "; fetch it (img2dataset), or leave its row out"
            missing.append(f"{place}image {item.image!r} {why}")
        elif listing and not item.captions and item.class_name is None:
            silent.append(f"{place}image {item.image!r} has neither caption nor class")
        else:
            named.append((item, name))

    reasons = {
        "rows that cannot be read": unreadable,
        "without their image": missing,
        "with neither caption nor class": silent,
    }
    return named, reasons
