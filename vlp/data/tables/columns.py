"""Which columns of a table hold images, captions and classes: as named, else by the field's usual
names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vlp.data.members import IMAGE_TYPES
from vlp.data.tables import fetched
from vlp.data.tables.files import option
from vlp.data.usual_names import CAPTION_NAMES, plain
from vlp.schema import did_you_mean

# Looked for in this order where none is named, in any case and with blanks, "-", "_" or nothing.
IMAGE_COLUMNS = (
    "image", "file_name", "filepath", "file_path", "image_path", "img_path", "image_name",
    "img_name", "image_file", "image_filename", "img", "path", "file", "picture", "photo",
    "images", "image_id", "url", "image_url", "urls", "image_urls",
)  # fmt: skip
DIALOGUE_COLUMNS = ("conversations", "messages")
CAPTION_COLUMNS = (*CAPTION_NAMES, *DIALOGUE_COLUMNS)
CLASS_COLUMNS = ("class", "class_name")
# Only without captions: beside them they may mean anything.
LABEL_COLUMNS = ("category", "label")
SPLIT_COLUMN = "split"

_IMAGE_NAME = re.compile(rf"\S.*\.(?:{'|'.join(sorted(IMAGE_TYPES))})(?:#\d+)?", re.IGNORECASE)
_ROWS = re.compile(r"(?:(\d*):(\d*))?")
_NUMBERED = re.compile(r"(.*?)[ _-]?(\d+)")


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How a table is read where it does not tell by itself. What takes tables takes these keys."""

    # Empty: image, file_name, filepath, … whatever their case (IMAGE_COLUMNS).
    image_column: str = ""
    # Empty: captions, caption, text, title, …, caption1, caption2, … (CAPTION_COLUMNS).
    caption_columns: str | list[str] = field(default_factory=list)
    # Empty: class or class_name; category or label if there are no captions.
    class_column: str = ""
    # Only rows whose column has this value, or one of these.
    where: dict[str, Any] = field(default_factory=dict)
    # Only these rows, as Python counts them: ":1000" the first thousand, "1000:" all but them.
    rows: str = ""
    # Only images that this list names, one a line (Flickr_8k.trainImages.txt).
    only: str = ""
    # Of a text table: a character, tab or space; empty: found in the first line.
    separator: str = ""
    encoding: str = ""  # such as cp1252; empty: UTF-8 or UTF-16
    # The first line names the columns; None: if it holds no image's name.
    header: bool | None = None
    # csv: quotes as RFC 4180 says; none: a quote is a character like others; auto: what fits.
    quoting: Literal["auto", "csv", "none"] = "auto"

    @property
    def named_captions(self) -> list[str]:
        """The caption columns that are named, as a list."""
        if isinstance(self.caption_columns, str):
            return [self.caption_columns]
        return list(self.caption_columns)

    @property
    def row_range(self) -> slice:
        """`rows` as Python's slice; ValueError for what is none."""
        match = _ROWS.fullmatch(self.rows.strip())
        if match is None:
            raise ValueError(
                f"rows is {self.rows!r}; expected numbers of rows such as :1000, 1000: or 10:20"
            )
        first, last = (int(number) if number else None for number in match.groups())
        return slice(first, last)


@dataclass(frozen=True)
class Chosen:
    """The columns that count; `captions` and `label` may be empty, not both."""

    image: str
    captions: tuple[str, ...]
    label: str

    def __str__(self) -> str:
        """As tools tell it."""
        parts = [f"image ← {self.image}"]
        if self.captions:
            parts.append(f"captions ← {', '.join(self.captions)}")
        if self.label:
            parts.append(f"class ← {self.label}")
        return ", ".join(parts)


def names_image(cell: Any) -> bool:
    """Whether a value looks like the file name of an image."""
    return isinstance(cell, str) and _IMAGE_NAME.fullmatch(cell.strip()) is not None


def is_usual(name: str) -> bool:
    """Whether a column of this name would be taken without being named."""
    names = (*IMAGE_COLUMNS, *CAPTION_COLUMNS, *CLASS_COLUMNS, *LABEL_COLUMNS, SPLIT_COLUMN)
    return plain(_without_number(name)) in map(plain, names)


def choose(
    columns: Sequence[str], sample: Sequence[dict[str, Any]], options: TableOptions, table: object
) -> Chosen:
    """Which of a table's columns hold what; `sample` are some of its rows. Raises ValueError that
    lists the columns.
    """
    image = _image_column(columns, sample, options, table)

    captions = [column(columns, name, table) for name in options.named_captions]
    if not captions:
        captions = usual_captions([name for name in columns if name != image])

    if options.class_column:
        label = column(columns, options.class_column, table)
    else:
        # A category beside captions may be anything.
        usual_labels = CLASS_COLUMNS if captions else (*CLASS_COLUMNS, *LABEL_COLUMNS)
        rest = [name for name in columns if name != image and name not in captions]
        label = usual(rest, usual_labels)

    if not captions and not label:
        if list(columns) == [image]:
            raise ValueError(
                f"{table} holds image names only; the captions are in another file, which is the "
                f"table. A list of names chooses among its rows: {option('only', str(table))}"
            )
        raise ValueError(
            f"{table}: no column is known to hold captions or classes; it has {listed(columns)}. "
            f"Name it: {option('caption_columns', 'NAME')}. "
            f"Or of classes: {option('class_column', 'NAME')}"
        )
    return Chosen(image, tuple(captions), label)


def _image_column(
    columns: Sequence[str], sample: Sequence[dict[str, Any]], options: TableOptions, table: object
) -> str:
    """The column of image names: as named, by a usual name, else by what it holds."""
    if options.image_column:
        return column(columns, options.image_column, table)
    # Its address says less: pictures lie under their keys.
    if fetched.is_of_fetched(columns):
        return fetched.KEY
    image = usual(columns, IMAGE_COLUMNS) or _image_by_content(columns, sample)

    if not image:
        raise ValueError(
            f"{table}: no column is known to hold image names; it has {listed(columns)}. "
            f"Name it: {option('image_column', 'NAME')}{_no_header_hint(columns)}"
        )
    return image


def column(columns: Sequence[str], name: str, table: object) -> str:
    """The column that a person means, whatever its case; raises ValueError with those that are
    there.
    """
    if name in columns:
        return name

    # Case and marks do not count, unless two columns differ in them only.
    same = [other for other in columns if plain(other) == plain(name)]
    if len(same) == 1:
        return same[0]
    raise ValueError(
        f"{table} has no column {name!r}{did_you_mean(name, columns)} (columns: {listed(columns)})"
    )


def split_column(columns: Sequence[str]) -> str:
    """The column that says which part a row belongs to, or ""."""
    return usual(columns, (SPLIT_COLUMN,))


def usual(columns: Sequence[str], names: Sequence[str]) -> str:
    """The column with the first of these usual names that there is, or ""."""
    # Reversed, so that the first of two columns of one plain name counts.
    by_plain_name = {plain(name): name for name in reversed(columns)}
    for name in names:
        if plain(name) in by_plain_name:
            return by_plain_name[plain(name)]
    return ""


def usual_captions(columns: Sequence[str]) -> list[str]:
    """The first usual caption column, or all of a numbered family: caption1, caption2, …"""
    for usual_name in CAPTION_COLUMNS:
        # caption, caption1, caption_2 and `Caption 3` are one family.
        family = [name for name in columns if plain(_without_number(name)) == plain(usual_name)]
        if family:
            return sorted(family, key=_number)
    return []


def _image_by_content(columns: Sequence[str], sample: Sequence[dict[str, Any]]) -> str:
    """The only column that holds nothing but image names, or ""."""
    if not sample:
        return ""

    candidates = [name for name in columns if all(names_image(row.get(name)) for row in sample)]
    return candidates[0] if len(candidates) == 1 else ""


def _no_header_hint(columns: Sequence[str]) -> str:
    """What to add where the names of the columns look like a row: numbers, addresses, sentences."""
    are_invented = all(re.fullmatch(r"column \d+", name) for name in columns)
    look_like_a_row = any(re.search(r"\d|https?:| .* ", name) for name in columns)
    if look_like_a_row and not are_invented:
        return f". If the first line is a row and names no columns: {option('header', 'no')}"
    return ""


def listed(columns: Sequence[str]) -> str:
    """Column names for a message."""
    shown = ", ".join(repr(name[:60]) for name in columns[:20])
    return f"{shown}, …" if len(columns) > 20 else shown


def _without_number(name: str) -> str:
    numbered = _NUMBERED.fullmatch(name.strip())
    return numbered[1] if numbered else name


def _number(name: str) -> int:
    numbered = _NUMBERED.fullmatch(name.strip())
    return int(numbered[2]) if numbered else -1
