"""What a text table does not say: its separator, whether its first line names the columns, and
names where it does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from vlp.data.tables.columns import TableOptions, is_usual, names_image
from vlp.data.tables.quotes import LIST_LINE, single

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", " ": "blanks"}
_SPELLED = {
    "tab": "\t",
    "\\t": "\t",
    "comma": ",",
    "semicolon": ";",
    "pipe": "|",
    "bar": "|",
    "space": " ",
    "blank": " ",
}
_DIRECTIVE = re.compile(r"sep=(.)", re.IGNORECASE)  # Excel's first line
_NUMBER = re.compile(r"-?[\d.]+")
_SAMPLED = 50  # lines that are looked at


def preamble(text: str, path: Path, options: TableOptions) -> tuple[int, str]:
    """Where the table begins, and its separator as far as it is known."""
    separator = _SPELLED.get(options.separator.lower(), options.separator)
    if options.separator and (len(separator) != 1 or separator in '"\n'):
        raise ValueError(
            f"separator {options.separator!r} is not one character, "
            f"nor one of {', '.join(_SPELLED)}"
        )

    first_line, _, _ = text.partition("\n")
    # Excel writes it where the separator is not that of the country.
    directive = _DIRECTIVE.fullmatch(first_line.strip())
    if directive:
        return len(first_line) + 1, separator or directive[1]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return 0, separator


def sample(text: str, first: int) -> list[str]:
    """The first lines that hold something."""
    lines = []
    # Found one by one: a text of a gigabyte is not split for its first lines.
    for match in re.finditer(r"[^\n]+", text[first:]):
        if match[0].strip():
            lines.append(match[0])
        if len(lines) == _SAMPLED:
            break

    return lines or [""]


def sniff(lines: Sequence[str], path: Path, options: TableOptions) -> str:
    """The separator that makes most sense of the first line; then of the lines below it."""
    default = "\t" if path.name.lower().removesuffix(".gz").endswith((".tsv", ".token")) else ","
    # What a person names must come out as a column.
    named = {options.image_column, options.class_column, *options.named_captions}

    def sense(separator: str) -> tuple[int, int, float, bool]:
        """What counts for a separator, the weightiest first: that it separates, known names in the
        first line, lines of equal length, and what the file's name says.
        """
        head = single(lines[0], separator).cells
        n_known = sum(1 for cell in head if names_image(cell) or is_usual(cell) or cell in named)
        n_equal = sum(1 for line in lines if len(single(line, separator).cells) == len(head))
        return (min(len(head), 2), n_known, n_equal / len(lines), separator == default)

    # Blanks separate only where nothing else does: they stand in every caption.
    best = max((separator for separator in SEPARATORS if separator != " "), key=sense)
    if sense(best)[0] == 1 and all(_spaced(line) for line in lines):
        return " "
    return best


def _spaced(line: str) -> bool:
    parts = LIST_LINE.fullmatch(line.strip())
    return parts is not None and names_image(parts[1])


def is_row(cells: Sequence[str]) -> bool:
    """Whether a first line is a row rather than names of columns: it holds an image's name, or an
    address.
    """
    return any(names_image(cell) or _is_address(cell) for cell in cells)


def _is_address(cell: str) -> bool:
    return cell.startswith(("http://", "https://"))


def unique(names: Sequence[str]) -> list[str]:
    """Column names without blanks around them; nameless and repeated ones are told apart by a
    number.
    """
    told_apart: list[str] = []
    for i, written in enumerate(names, 1):
        name = written.strip() or f"column {i}"
        n_before = sum(1 for earlier in names[: i - 1] if earlier.strip() == name)
        told_apart.append(f"{name} {n_before + 1}" if n_before else name)
    return told_apart


def invented(lines: Sequence[str], separator: str, without_header: bool) -> list[str]:
    """Names for the columns of a table without a header: image, then caption (label if it is a
    number), caption2, …

    The image's is the one that holds a file name, else an address; where a person has said that
    there is no header, else the first.
    """
    rows = [single(line, separator).cells for line in lines]
    # Of the shortest row, so that every column has a cell in each.
    n_columns = min((len(row) for row in rows if len(row) > 1), default=1)
    image = _place_of_image(rows[0][:n_columns])
    if image is None and not without_header:
        return [f"column {i + 1}" for i in range(n_columns)]

    names: list[str] = []
    n_captions = 0
    for i in range(n_columns):
        are_numbers = all(len(row) > i and _NUMBER.fullmatch(row[i]) for row in rows)
        if i == (image or 0):
            names.append("image")
        elif are_numbers:
            names.append("label" if n_columns == 2 else f"column {i + 1}")
        else:
            n_captions += 1
            names.append(f"caption{n_captions}" if n_captions > 1 else "caption")
    return names


def _place_of_image(cells: Sequence[str]) -> int | None:
    """Which of a row's cells names an image: by its extension, else as an address."""
    for is_image in (names_image, _is_address):
        for i, cell in enumerate(cells):
            if is_image(cell):
                return i
    return None
