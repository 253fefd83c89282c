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
_SAMPLED = 50  # lines that are looked at


def preamble(text: str, path: Path, options: TableOptions) -> tuple[int, str]:
    """Where the table begins, and its separator as far as it is known."""
    separator = _SPELLED.get(options.separator.lower(), options.separator)
    if options.separator and (len(separator) != 1 or separator in '"\n'):
        raise ValueError(
            f"separator {options.separator!r} is not one character, nor one of {', '.join(_SPELLED)}"
        )

    first_line, _, _ = text.partition("\n")
    directive = _DIRECTIVE.fullmatch(first_line.strip())
    if directive:
        return len(first_line) + 1, separator or directive[1]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return 0, separator


def sample(text: str, first: int) -> list[str]:
    """The first lines that hold something."""
    lines = []
    for match in re.finditer(r"[^\n]+", text[first:]):
        if match[0].strip():
            lines.append(match[0])
        if len(lines) == _SAMPLED:
            break
    return lines or [""]


def sniff(lines: Sequence[str], path: Path, options: TableOptions) -> str:
    """The separator that makes most sense of the first line; then of the lines below it."""
    default = "\t" if path.name.lower().removesuffix(".gz").endswith((".tsv", ".token")) else ","
    named = {options.image_column, options.class_column, *options.named_captions}

    def sense(separator: str) -> tuple[int, int, float, bool]:
        head = single(lines[0], separator).cells
        known = sum(1 for cell in head if names_image(cell) or is_usual(cell) or cell in named)
        same = [line for line in lines if len(single(line, separator).cells) == len(head)]
        return (min(len(head), 2), known, len(same) / len(lines), separator == default)

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
    result: list[str] = []
    for i, name in enumerate(names, 1):
        plain = name.strip() or f"column {i}"
        times = sum(1 for earlier in names[: i - 1] if earlier.strip() == plain)
        result.append(f"{plain} {times + 1}" if times else plain)
    return result


def invented(lines: Sequence[str], separator: str, told: bool) -> list[str]:
    """Names for the columns of a table without a header: image, then caption (label if it is a
    number), caption2, …

    The image's is the one that holds a file name; where a person has told that there is no header,
    else the first.
    """
    rows = [single(line, separator).cells for line in lines]
    n_columns = min((len(row) for row in rows if len(row) > 1), default=1)
    first = rows[0][:n_columns]
    named = [i for i, cell in enumerate(first) if names_image(cell)]
    addresses = [i for i, cell in enumerate(first) if _is_address(cell)]
    image = next(iter([*named, *addresses]), 0 if told else None)
    names = []
    for i in range(n_columns):
        numbers = all(len(row) > i and re.fullmatch(r"-?[\d.]+", row[i]) for row in rows)
        if i == image:
            names.append("image")
        elif numbers:
            names.append("label" if n_columns == 2 else f"column {i + 1}")
        else:
            n_texts = sum(1 for name in names if name.startswith("caption"))
            names.append(f"caption{n_texts + 1}" if n_texts else "caption")
    if image is None:
        return [f"column {i + 1}" for i in range(n_columns)]
    return names
