"""Which images are packed: the rows of the table, and those of the chosen part."""

from __future__ import annotations

import argparse
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named
    from vlp.data.tables import Item, Listing
    from vlp.data.trees import Tree


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


def complete(tree: Tree, archive: Archive) -> None:
    """Give pairs the columns that their JSON lacks, of img2dataset's parquet files beside them."""
    from vlp.data.stored import StoredPath
    from vlp.data.tables import fetched

    if not tree.paired or isinstance(archive.path, StoredPath):
        return
    items: dict[str, list[Item]] = {}
    for item in tree.items:
        items.setdefault(item.image.rpartition("/")[0], []).append(item)

    n_completed = 0
    for folder in filter(None, items):
        try:
            rows = fetched.rows_beside(archive.path / folder)
        # The pairs are whole without it, and it stays among what is left out.
        except (ValueError, OSError) as error:
            tree.notes.append(str(error))
            continue
        for item in items[folder]:
            row = rows.get(PurePosixPath(item.image).stem)
            # A row of another fetch into the same folder is told by its address.
            if row is None or item.meta.get("url", row["url"]) != row["url"]:
                continue
            # What lies beside the picture is its caption.
            row = {name: value for name, value in row.items() if name != "caption"}
            item.meta = fetched.completed(item.meta, row)
            n_completed += 1
        if rows:
            archive.left_out.remove(".parquet", f"{folder}.parquet")
    if n_completed:
        tree.notes.append(
            f"{n_completed:,} images were completed from img2dataset's parquet files beside them"
        )


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
