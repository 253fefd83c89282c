"""A table's rows, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.data import stored
from vlp.data.tables import delimited, fetched, files, forms, values
from vlp.data.tables.columns import TableOptions
from vlp.data.tables.parquet import parse_parquet


@dataclass
class Table:
    """Rows as mappings of columns to values. Those of a text table are texts, and empty cells are
    absent.
    """

    path: Path
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]  # with the line, or the number of the row
    by_line: bool
    textual: bool
    problems: list[str]  # a line for each row that cannot be used
    notes: list[str]

    def place(self, number: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.path}:{number}" if self.by_line else f"{self.path}: row {number}"

    def converters(self, names: Iterable[str]) -> dict[str, Callable[[Any], Any]]:
        """For each column what makes a JSON value of a cell: by all cells of the column in a text
        table, as it is elsewhere.
        """
        if not self.textual:
            return dict.fromkeys(names, _as_it_is)

        # By the whole column: one text among the numbers makes all of them texts.
        result = {}
        for name in names:
            cells = (row[name] for _, row in self.rows if name in row)
            result[name] = _where_filled(values.converter(cells))
        return result

    def records(self, texts: Iterable[str] = ()) -> list[dict[str, Any]]:
        """The rows with typed values; the columns `texts` stay as written."""
        texts = set(texts)
        typed = self.converters(name for name in self.columns if name not in texts)
        typed |= dict.fromkeys(texts, _as_it_is)

        records = []
        for _, row in self.rows:
            records.append({name: typed[name](value) for name, value in row.items()})
        return records


def _as_it_is(value: Any) -> Any:
    return value


def _where_filled(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The converter, for cells of which some are absent."""

    def converted(value: Any) -> Any:
        return None if value is None else convert(value)

    return converted


def read(path: str | Path, options: TableOptions | None = None) -> Table:
    """The rows of a table; raises ValueError for what is none, saying what was found and what to
    do, and OSError.
    """
    path = stored.source(str(path))
    options = options or TableOptions()
    if paths := fetched.files_in(path):
        return _of_fetched(path, paths)
    kind = files.kind_of(path)
    if kind == ".parquet":
        # Says what is wrong with a path, which pyarrow would in its own words.
        files.load(path)
        rows, notes = parse_parquet(path, unsaid=fetched.picture_column(path))
        if not rows:
            raise ValueError(f"{path} has no rows")
        return Table(
            path, _columns_of(rows), rows, by_line=False, textual=False, problems=[], notes=notes
        )

    text = files.decode(files.load(path), path, options.encoding)
    if kind in files.DELIMITED:
        parsed = delimited.parse(text, path, options)
        if not parsed.rows and parsed.problems:
            raise ValueError(parsed.problems[0])
        if not parsed.rows:
            names = ", ".join(parsed.columns)[:120]
            raise ValueError(f"{path} has no rows below the line that names its columns ({names})")
        return Table(
            path,
            parsed.columns,
            parsed.rows,
            by_line=True,
            textual=True,
            problems=parsed.problems,
            notes=[],
        )

    rows, by_line, problems = forms.parse_json(text, path, by_line=kind in files.JSON_LINES)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return Table(path, _columns_of(rows), rows, by_line, textual=False, problems=problems, notes=[])


def _of_fetched(folder: Path, paths: list[Path]) -> Table:
    """The rows of all parquet files of img2dataset in a folder, numbered through."""
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for path in paths:
        numbered, some_notes = parse_parquet(path, unsaid=fetched.picture_column(path))
        rows += [row for _, row in numbered]
        notes += some_notes

    every_row = list(enumerate(rows, 1))
    columns = _columns_of(every_row)
    return Table(folder, columns, every_row, by_line=False, textual=False, problems=[], notes=notes)


def read_json(path: str | Path) -> Any:
    """The value of a JSON file that has a form of its own; raises ValueError, OSError."""
    path = Path(path)
    return forms.whole(files.decode(files.load(path), path), path)


def _columns_of(rows: list[tuple[int, dict[str, Any]]]) -> list[str]:
    """All columns of all rows, in the order in which they are met."""
    names: dict[str, None] = {}
    for _, row in rows:
        names.update(dict.fromkeys(row))
    return list(names)
