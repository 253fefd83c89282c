"""One row of a text table: where its cells end, and what its quotes mean."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

# Separators with which no quoting is usual: a quote that does not fit is a character.
LITERAL = "\t|"
# A name, blanks, and the rest of the line: the separator " ".
LIST_LINE = re.compile(r"(\S+)[ \t]+(\S.*)")


class Unfitting(ValueError):
    """A quote that does not quote; `line` is where it opens."""

    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(reason)


class Row(NamedTuple):
    """A row's cells as they are meant, and as they are written."""

    cells: list[str]
    written: list[str]


def single(line: str, separator: str) -> Row:
    """One line by itself, with its quotes as far as they fit."""
    try:
        return quoted_row(line, 0, 1, separator, "auto")[0]
    except Unfitting:
        return plain_row(line, separator)


def plain_row(line: str, separator: str) -> Row:
    """A line in which quotes mean nothing."""
    if separator == " ":
        parts = LIST_LINE.fullmatch(line.strip())
        written = list(parts.groups()) if parts else [line]
    else:
        written = line.split(separator)
    return Row([cell.strip(" ") for cell in written], written)


def quoted_row(text: str, start: int, line: int, separator: str, quoting: str) -> tuple[Row, int]:
    """The row that begins at `start`, and where it ends; raises Unfitting for a quote left open."""
    if separator == " ":
        end = line_end(text, start)
        return plain_row(text[start:end], separator), end

    # A field at a time; only one in quotes may run over the end of a line.
    in_quotes = _in_quotes(separator)
    row = Row([], [])
    position = start
    while True:
        match = in_quotes.match(text, position)
        if match:
            end = match.end()
            cell = match[1].replace('""', '"')
        else:
            end = _cell_end(text, position, separator)
            cell = text[position:end].strip(" ")
            if cell.startswith('"'):
                line_of_field = line + text.count("\n", start, position)
                _check_open(text, position, separator, quoting, line_of_field)

        row.cells.append(cell)
        row.written.append(text[position:end])
        if end >= len(text) or text[end] == "\n":
            return row, end
        position = end + 1


@lru_cache
def _in_quotes(separator: str) -> re.Pattern[str]:
    """A field in quotes that ends where a field may end."""
    return re.compile(rf' *"([^"]*(?:""[^"]*)*)" *(?={re.escape(separator)}|\n|\Z)')


def _check_open(text: str, position: int, separator: str, quoting: str, line: int) -> None:
    """What to think of a field that begins with a quote and does not end with one: raises
    Unfitting, or it is text.
    """
    n_quotes = text.count('"', position, line_end(text, position))
    if n_quotes % 2:
        raise Unfitting(line, "a quote opens a field here and does not close it")

    # A comma's quote may belong to the text: `"Stop", it says`.
    if quoting == "csv" or separator in LITERAL:
        raise Unfitting(line, "text follows a closed quote here")


def _cell_end(text: str, position: int, separator: str) -> int:
    """Where a field without quotes ends: at the next separator, or with its line."""
    last = line_end(text, position)
    end = text.find(separator, position, last)
    return last if end < 0 else end


def line_end(text: str, start: int) -> int:
    """Where the line that holds `start` ends."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end
