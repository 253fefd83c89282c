"""Text tables (.csv, .tsv, .txt, .token): separator, header and quotes are found in the text, rows
keep their lines.

Read as the field writes them: Excel's and pandas' CSV in any separator, Flickr's token files
(`a.jpg#0<TAB>caption`), Kaggle's captions.txt (commas in captions without quotes), results.csv
(`image_name| comment_number| comment`), plain lists of names, and `path label` lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlp.data.tables.columns import IMAGE_COLUMNS, TableOptions, names_image, usual
from vlp.data.tables.files import option
from vlp.data.tables.quotes import LITERAL, Row, Unfitting, line_end, plain_row, quoted_row, single
from vlp.data.tables.sniff import SEPARATORS, invented, is_row, preamble, sample, sniff, unique

_NUMBERED_NAME = re.compile(r"(.+)#\d+")  # a.jpg#3: the fourth caption of a.jpg


@dataclass
class Delimited:
    """A text table: its columns, its rows with their lines, and a line for each row that cannot be
    used.
    """

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]  # empty cells are left out
    problems: list[str]


def parse(text: str, path: Path, options: TableOptions) -> Delimited:
    """The columns and rows of a text table; raises ValueError for what cannot be read as one,
    saying what to do.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    first, separator = preamble(text, path, options)
    lines = sample(text, first)
    separator = separator or sniff(lines, path, options)

    # A first line without an image's name names the columns, unless a person says otherwise.
    head = single(lines[0], separator).cells
    has_header = not is_row(head) if options.header is None else options.header
    if has_header:
        columns = unique(head)
        first += text[first:].index(lines[0]) + len(lines[0]) + 1
    else:
        columns = invented(lines, separator, options.header is False)
    return _Reader(text, first, separator, columns, path, options).read()


class _Reader:
    """The rows below the header, under one reading of the quotes."""

    def __init__(
        self,
        text: str,
        first: int,
        separator: str,
        columns: list[str],
        path: Path,
        options: TableOptions,
    ) -> None:
        self.text = text
        self.first = first
        self.separator = separator
        self.columns = columns
        self.path = path
        self.options = options

        # What tells a row where one is met inside a field: the place of its image's name, and an
        # example of such a name.
        self.image = self._image_column()
        cells = self._first_cells()
        self.name = cells[self.image] if len(cells) > self.image else ""

    def read(self) -> Delimited:
        """All rows; raises ValueError where quotes leave open what the rows are."""
        quoting = self.options.quoting
        if quoting == "none" or '"' not in self.text:
            return self._collect(self._plain_rows())

        try:
            return self._collect(self._quoted_rows())
        except Unfitting as problem:
            # With tabs and bars no quoting is usual: the quotes are text.
            if quoting == "auto" and self.separator in LITERAL:
                return self._collect(self._plain_rows())
            raise ValueError(
                f"{self.path}:{problem.line}: {problem.reason}; close the quote, double one that "
                f"belongs to the text, or read quotes as text: {option('quoting', 'none')}"
            ) from None

    def _collect(self, rows: Iterator[tuple[int, Row]]) -> Delimited:
        """The rows by column, and a line for each that has another number of fields."""
        result = Delimited(self.columns, [], [])
        for line, row in rows:
            cells = self._fitted(row)
            if cells is None:
                result.problems.append(self._misfit(line, row))
                continue

            if "#" in cells[self.image]:
                cells[self.image] = _without_number(cells[self.image])

            filled_cells = {}
            for name, cell in zip(self.columns, cells):
                if cell and not cell.isspace():
                    filled_cells[name] = cell
            result.rows.append((line, filled_cells))
        return result

    def _plain_rows(self) -> Iterator[tuple[int, Row]]:
        """(line, row) of each row, with quotes that mean nothing."""
        n_lines_before = self.text.count("\n", 0, self.first)
        lines = self.text[self.first :].split("\n")
        for number, line in enumerate(lines, n_lines_before + 1):
            if line and not line.isspace():
                yield number, plain_row(line, self.separator)

    def _quoted_rows(self) -> Iterator[tuple[int, Row]]:
        """(line, row) of each row; one in quotes may run over several lines. Raises Unfitting."""
        quoting = self.options.quoting
        position = self.first
        number = 1 + self.text.count("\n", 0, self.first)
        while position < len(self.text):
            end = line_end(self.text, position)
            line = self.text[position:end]
            if '"' in line:
                row, end = quoted_row(self.text, position, number, self.separator, quoting)
                has_several_lines = end > position + len(line)
                if has_several_lines and quoting == "auto":
                    self._refuse_swallowed(row, number)
                yield number, row
            elif line and not line.isspace():
                # Most lines, by the shorter way.
                yield number, plain_row(line, self.separator)

            number += 1 + self.text.count("\n", position, end)
            position = end + 1

    def _refuse_swallowed(self, row: Row, number: int) -> None:
        """A quoted field may hold line breaks, but not what looks like rows of this table."""
        for written in row.written:
            _, *following = written.split("\n")
            n_rows = sum(1 for line in following if self._looks_like_a_row(line))
            if n_rows:
                raise Unfitting(
                    number,
                    f"a quoted field begins here and takes {n_rows} lines with it that look like "
                    "rows",
                )
            number += len(following)

    def _looks_like_a_row(self, line: str) -> bool:
        cells = plain_row(line, self.separator).cells
        if len(cells) < len(self.columns):
            return False

        cell = cells[self.image].strip('"')
        if names_image(cell):
            return True
        # Ids are told by their form only.
        are_ids = not names_image(self.name)
        return are_ids and _shape(cell) == _shape(self.name)

    def _first_cells(self) -> list[str]:
        for line in sample(self.text, self.first):
            return single(line, self.separator).cells[: len(self.columns)]
        return []

    def _image_column(self) -> int:
        """The column of image names, to know a row where one is met in a field: by its name, else
        by the first row.
        """
        wanted = self.options.image_column or usual(self.columns, IMAGE_COLUMNS)
        if wanted in self.columns:
            return self.columns.index(wanted)

        for i, cell in enumerate(self._first_cells()):
            if names_image(cell):
                return i
        return 0

    def _fitted(self, row: Row) -> list[str] | None:
        """A value for each column, or None. Of two columns, the caption's takes the separators that
        no quote hides.
        """
        if len(row.cells) == len(self.columns):
            return row.cells
        if len(row.cells) < 3 or len(self.columns) != 2:
            return None

        # Kaggle's captions.txt has commas in captions, and no quotes.
        if self.image == 0:
            return [row.cells[0], self.separator.join(row.written[1:]).strip()]
        return [self.separator.join(row.written[:-1]).strip(), row.cells[-1]]

    def _misfit(self, line: int, row: Row) -> str:
        mark = SEPARATORS.get(self.separator, repr(self.separator))
        fields = f"{len(row.cells)} field{'s' if len(row.cells) > 1 else ''}"
        written = self.separator.join(row.written)
        return (
            f"{self.path}:{line}: found {fields}, expected {len(self.columns)} separated by {mark} "
            f"({', '.join(self.columns)}): {written[:80]!r}; put quotes around a field that holds "
            f"the separator, or name another one: {option('separator', 'CHARACTER')}"
        )


def _without_number(name: str) -> str:
    """`a.jpg#0` names a.jpg."""
    match = _NUMBERED_NAME.fullmatch(name)
    return match[1] if match and names_image(match[1]) else name


def _shape(cell: str) -> str:
    """What kind of characters a name is made of: 0012-ab → 0-a."""
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "0", cell))
