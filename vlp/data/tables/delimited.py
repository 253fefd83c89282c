"""Text tables (.csv, .tsv, .txt, .token): separator, header and quotes are found in the text, rows keep their lines.

Read as the field writes them: Excel's and pandas' CSV in any separator, Flickr's token files (`a.jpg#0<TAB>caption`),
Kaggle's captions.txt (commas in captions without quotes), results.csv (`image_name| comment_number| comment`), plain
lists of names, and `path label` lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from vlp.data.tables.columns import IMAGE_COLUMNS, TableOptions, is_usual, names_image, usual
from vlp.data.tables.files import option

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars", " ": "blanks"}
_SPELLED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "bar": "|", "space": " ", "blank": " "}
_LITERAL = "\t|"  # where no quoting is usual: a quote that does not fit is a character
_DIRECTIVE = re.compile(r"sep=(.)", re.IGNORECASE)  # Excel's first line
_LIST_LINE = re.compile(r"(\S+)[ \t]+(\S.*)")
_NUMBERED_NAME = re.compile(r"(.+)#\d+")  # a.jpg#3: the fourth caption of a.jpg
_SAMPLED = 50  # lines that are looked at to find separator and header


@dataclass
class Delimited:
    """A text table: its columns, its rows with their lines, and a line for each row that cannot be used."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]  # empty cells are left out
    problems: list[str]


class _Unfitting(ValueError):
    """A quote that does not quote; `line` is where it opens."""

    def __init__(self, line: int, reason: str) -> None:
        self.line, self.reason = line, reason
        super().__init__(reason)


class _Row(NamedTuple):
    """A row's cells as they are meant, and as they are written."""

    cells: list[str]
    written: list[str]


def parse(text: str, path: Path, options: TableOptions) -> Delimited:
    """The columns and rows of a text table; raises ValueError for what cannot be read as one, saying what to do."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    first, separator = _preamble(text, path, options)
    lines = _sample(text, first)
    separator = separator or _sniff(lines, path, options)

    head = _single(lines[0], separator).cells
    has_header = not _is_row(head) if options.header is None else options.header
    if has_header:
        columns = _unique(head)
        first += text[first:].index(lines[0]) + len(lines[0]) + 1
    else:
        columns = _invented(lines, separator, options.header is False)
    table = _Reader(text, first, separator, columns, path, options).read()
    _unnumber(table)
    return table


def _preamble(text: str, path: Path, options: TableOptions) -> tuple[int, str]:
    """Where the table begins, and its separator as far as it is known."""
    separator = _SPELLED.get(options.separator.lower(), options.separator)
    if options.separator and (len(separator) != 1 or separator in '"\n'):
        raise ValueError(f"separator {options.separator!r} is not one character, nor one of {', '.join(_SPELLED)}")

    first_line, _, _ = text.partition("\n")
    directive = _DIRECTIVE.fullmatch(first_line.strip())
    if directive:
        return len(first_line) + 1, separator or directive[1]
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return 0, separator


def _sample(text: str, first: int) -> list[str]:
    """The first lines that hold something."""
    lines = []
    for match in re.finditer(r"[^\n]+", text[first:]):
        if match[0].strip():
            lines.append(match[0])
        if len(lines) == _SAMPLED:
            break
    return lines or [""]


def _sniff(lines: Sequence[str], path: Path, options: TableOptions) -> str:
    """The separator that makes most sense of the first line; then of the lines below it."""
    default = "\t" if path.name.lower().removesuffix(".gz").endswith((".tsv", ".token")) else ","
    named = {options.image_column, options.class_column, *options.named_captions}

    def sense(separator: str) -> tuple[int, int, float, bool]:
        head = _single(lines[0], separator).cells
        known = sum(1 for cell in head if names_image(cell) or is_usual(cell) or cell in named)
        same = [line for line in lines if len(_single(line, separator).cells) == len(head)]
        return (min(len(head), 2), known, len(same) / len(lines), separator == default)

    best = max((separator for separator in SEPARATORS if separator != " "), key=sense)
    if sense(best)[0] == 1 and all(_spaced(line) for line in lines):
        return " "
    return best


def _spaced(line: str) -> bool:
    parts = _LIST_LINE.fullmatch(line.strip())
    return parts is not None and names_image(parts[1])


def _is_row(cells: Sequence[str]) -> bool:
    """Whether a first line is a row: it holds an image's name or an address, or nothing that names a column could be."""
    return any(names_image(cell) or cell.startswith(("http://", "https://")) for cell in cells)


def _unique(names: Sequence[str]) -> list[str]:
    """Column names without blanks around them; nameless and repeated ones are told apart by a number."""
    result: list[str] = []
    for i, name in enumerate(names, 1):
        plain = name.strip() or f"column {i}"
        times = sum(1 for earlier in names[: i - 1] if earlier.strip() == plain)
        result.append(f"{plain} {times + 1}" if times else plain)
    return result


def _invented(lines: Sequence[str], separator: str, told: bool) -> list[str]:
    """Names for the columns of a table without a header: image, then caption (label if it is a number), caption2, …

    The image's is the one that holds a file name; where a person has told that there is no header, else the first.
    """
    rows = [_single(line, separator).cells for line in lines]
    n_columns = min((len(row) for row in rows if len(row) > 1), default=1)
    image = next((i for i in range(n_columns) if names_image(rows[0][i])), 0 if told else None)
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


def _unnumber(table: Delimited) -> None:
    """`a.jpg#0` names a.jpg."""
    for _, row in table.rows:
        for name, cell in row.items():
            match = _NUMBERED_NAME.fullmatch(cell)
            if match and names_image(match[1]):
                row[name] = match[1]


def _single(line: str, separator: str) -> _Row:
    """One line by itself, with its quotes as far as they fit."""
    try:
        return _quoted_row(line, 0, 1, separator, "auto")[0]
    except _Unfitting:
        return _plain_row(line, separator)


def _plain_row(line: str, separator: str) -> _Row:
    """A line in which quotes mean nothing."""
    if separator == " ":
        parts = _LIST_LINE.fullmatch(line.strip())
        written = list(parts.groups()) if parts else [line]
    else:
        written = line.split(separator)
    return _Row([cell.strip(" ") for cell in written], written)


def _quoted_row(text: str, start: int, line: int, separator: str, quoting: str) -> tuple[_Row, int]:
    """The row that begins at `start`, and where it ends; raises _Unfitting for a quote left open."""
    if separator == " ":
        end = _line_end(text, start)
        return _plain_row(text[start:end], separator), end
    in_quotes = _in_quotes(separator)
    row, position = _Row([], []), start
    while True:
        match = in_quotes.match(text, position)
        if match:
            cell, end = match[1].replace('""', '"'), match.end()
        else:
            end = _cell_end(text, position, separator)
            cell = text[position:end].strip(" ")
            if cell.startswith('"'):
                _check_open(text, position, separator, quoting, line + text.count("\n", start, position))
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
    """What to think of a field that begins with a quote and does not end with one: raises _Unfitting, or it is text."""
    if text.count('"', position, _line_end(text, position)) % 2:
        raise _Unfitting(line, "a quote opens a field here and does not close it")
    if quoting == "csv" or separator in _LITERAL:
        raise _Unfitting(line, "text follows a closed quote here")


def _cell_end(text: str, position: int, separator: str) -> int:
    line_end = _line_end(text, position)
    end = text.find(separator, position, line_end)
    return line_end if end < 0 else end


def _line_end(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end


class _Reader:
    """The rows below the header, under one reading of the quotes."""

    def __init__(
        self, text: str, first: int, separator: str, columns: list[str], path: Path, options: TableOptions
    ) -> None:
        self.text, self.first, self.separator = text, first, separator
        self.columns, self.path, self.options = columns, path, options
        self.image = self._image_column()
        cells = self._first_cells()
        self.name = cells[self.image] if len(cells) > self.image else ""

    def read(self) -> Delimited:
        quoting = self.options.quoting
        if '"' not in self.text:
            return self._collect(self._plain_rows())
        if quoting == "none":
            return self._collect(self._plain_rows())
        try:
            return self._collect(self._quoted_rows())
        except _Unfitting as problem:
            if quoting == "auto" and self.separator in _LITERAL:
                return self._collect(self._plain_rows())
            raise ValueError(
                f"{self.path}:{problem.line}: {problem.reason}; close the quote, double one that belongs to the text, or "
                f"read quotes as text: {option('quoting', 'none')}"
            ) from None

    def _collect(self, rows: Iterator[tuple[int, _Row]]) -> Delimited:
        result = Delimited(self.columns, [], [])
        for line, row in rows:
            cells = self._fitted(row)
            if cells is None:
                result.problems.append(self._misfit(line, row))
            else:
                result.rows.append((line, {name: cell for name, cell in zip(self.columns, cells) if cell and not cell.isspace()}))
        return result

    def _plain_rows(self) -> Iterator[tuple[int, _Row]]:
        first_line = 1 + self.text.count("\n", 0, self.first)
        for number, line in enumerate(self.text[self.first :].split("\n"), first_line):
            if line and not line.isspace():
                yield number, _plain_row(line, self.separator)

    def _quoted_rows(self) -> Iterator[tuple[int, _Row]]:
        position, number = self.first, 1 + self.text.count("\n", 0, self.first)
        while position < len(self.text):
            end = _line_end(self.text, position)
            line = self.text[position:end]
            if '"' in line:
                row, end = _quoted_row(self.text, position, number, self.separator, self.options.quoting)
                if end > position + len(line) and self.options.quoting == "auto":
                    self._refuse_swallowed(row, number)
                yield number, row
            elif line and not line.isspace():
                yield number, _plain_row(line, self.separator)
            number += 1 + self.text.count("\n", position, end)
            position = end + 1

    def _refuse_swallowed(self, row: _Row, number: int) -> None:
        """A quoted field may hold line breaks, but not what looks like rows of this table."""
        for written in row.written:
            _, *following = written.split("\n")
            n_rows = sum(1 for line in following if self._looks_like_a_row(line))
            if n_rows:
                reason = f"a quoted field begins here and takes {n_rows} lines with it that look like rows"
                raise _Unfitting(number, reason)
            number += len(following)

    def _looks_like_a_row(self, line: str) -> bool:
        cells = _plain_row(line, self.separator).cells
        if len(cells) < len(self.columns):
            return False
        cell = cells[self.image].strip('"')
        return names_image(cell) or (not names_image(self.name) and _shape(cell) == _shape(self.name))

    def _first_cells(self) -> list[str]:
        for line in _sample(self.text, self.first):
            return _single(line, self.separator).cells[: len(self.columns)]
        return []

    def _image_column(self) -> int:
        """The column of image names, to know a row where one is met in a field: by its name, else by the first row."""
        wanted = self.options.image_column or usual(self.columns, IMAGE_COLUMNS)
        if wanted in self.columns:
            return self.columns.index(wanted)
        return next((i for i, cell in enumerate(self._first_cells()) if names_image(cell)), 0)

    def _fitted(self, row: _Row) -> list[str] | None:
        """A value for each column, or None. Of two columns, the caption's takes the separators that no quote hides."""
        if len(row.cells) == len(self.columns):
            return row.cells
        if len(row.cells) < 3 or len(self.columns) != 2:
            return None
        if self.image == 0:
            return [row.cells[0], self.separator.join(row.written[1:]).strip()]
        return [self.separator.join(row.written[:-1]).strip(), row.cells[-1]]

    def _misfit(self, line: int, row: _Row) -> str:
        mark = SEPARATORS.get(self.separator, repr(self.separator))
        fields = f"{len(row.cells)} field{'s' if len(row.cells) > 1 else ''}"
        return (
            f"{self.path}:{line}: found {fields}, expected {len(self.columns)} separated by {mark} "
            f"({', '.join(self.columns)}): {self.separator.join(row.written)[:80]!r}; put quotes around a field that holds "
            f"the separator, or name another one: {option('separator', 'CHARACTER')}"
        )


def _shape(cell: str) -> str:
    """What kind of characters a name is made of: 0012-ab → 0-a."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", cell))

