"""Pairs of texts in a table, for `data.pairs: text`: a query stands in the picture's place.

{name: texts, path: nli_for_simcse.csv, query: sent0, text: sent1, negatives: hard_neg}

Each row of a .csv, .tsv, .jsonl, .json or .parquet file is a sample. Its other columns are the
sample's JSON, as those of a table of pictures are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

from vlp.config import Captions
from vlp.data.sources import check_roles
from vlp.data.sources._recorded import Record, Recorded
from vlp.data.tables import Table, columns, read, values
from vlp.types import QUERY_TYPE, Sample

_SHOWN = 10  # rows that cannot be used, in an error


@dataclass(frozen=True)
class Options:
    """Where the table is, and which of its columns hold what."""

    path: str  # .csv, .tsv, .txt, .jsonl, .json or .parquet
    query: str = "query"  # column of the text that stands in the picture's place
    # Column of the text that belongs to it, or several columns of which one is drawn, as captions
    # of a picture are.
    text: str | list[str] = "text"
    # Columns of texts that are nearly right: hard captions of the terms that read such.
    negatives: str | list[str] = field(default_factory=list)
    # Rows without a query or a text: refuse, or leave out.
    on_missing: Literal["fail", "skip"] = "fail"


@dataclass(frozen=True)
class _Columns:
    """The columns that count, as the table spells them."""

    query: str
    texts: list[str]
    negatives: list[str]

    @classmethod
    def of(cls, table: Table, options: Options) -> _Columns:
        """Those that options name; ValueError for a name that is none, or is two of them."""

        def spelled(names: str | list[str]) -> list[str]:
            listed = [names] if isinstance(names, str) else names
            return [columns.column(table.columns, name, table.path) for name in listed]

        [query] = spelled(options.query)
        result = cls(query, spelled(options.text), spelled(options.negatives))

        # A text may stand beside itself: two passes of one text.
        beside = [*result.texts, *result.negatives]
        if len(set(beside)) < len(beside) or query in result.negatives:
            raise ValueError(
                f"{table.path}: text and negatives name {', '.join(map(repr, beside))}, and query "
                f"{query!r}; expected different columns (query and text may be one)"
            )
        return result

    @property
    def all(self) -> set[str]:
        return {self.query, *self.texts, *self.negatives}


def open(options: Options, captions: Captions) -> Texts:
    """Read the table; raises ValueError or OSError."""
    table = read(options.path)
    chosen = _Columns.of(table, options)
    check_roles(chosen.texts, captions, options.path)

    records: list[Record] = []
    problems = list(table.problems)
    for (number, _), row in zip(table.rows, table.records(chosen.all)):
        try:
            records.append(_record(number, row, chosen, captions.roles))
        except ValueError as error:
            problems.append(f"{table.place(number)}: {error}")

    if problems and (options.on_missing == "fail" or not records):
        lines = "\n".join(problems[:_SHOWN])
        raise ValueError(
            f"{table.path}: {len(problems)} rows cannot be used, of {len(table.rows)}; "
            f"on_missing: skip leaves them out where others remain\n{lines}"
        )
    return Texts(records, problems, table)


def _record(number: int, row: dict[str, Any], chosen: _Columns, roles: list[str]) -> Record:
    """One row; ValueError for one without a query, or without a text."""
    queries = _texts(row, chosen.query)
    if len(queries) != 1:
        raise ValueError(
            f"the column {chosen.query!r} holds {len(queries)} texts, expected one query"
        )

    captions: list[str] = []
    of_captions: list[str] = []
    for place, name in enumerate(chosen.texts):
        of_column = _texts(row, name)
        captions += of_column
        if roles and len(chosen.texts) > 1:
            of_captions += [roles[place]] * len(of_column)
    if not captions:
        names = ", ".join(map(repr, chosen.texts))
        raise ValueError(f"the column {names} is empty, expected a text")

    meta = {
        name: value for name, value in row.items() if name not in chosen.all and value is not None
    }
    if chosen.negatives:
        # An empty cell is no negative, and its row has one less.
        of_columns = [_texts(row, name) for name in chosen.negatives]
        meta["negatives"] = list(chain.from_iterable(of_columns))
    return Record(str(number), queries[0], captions, meta, of_captions)


def _texts(row: dict[str, Any], name: str) -> list[str]:
    """The texts of a cell; ValueError for what is none."""
    try:
        return values.texts(row.get(name))
    except values.NoText as error:
        raise ValueError(f"{name}: {error}") from None


class Texts(Recorded):
    """Random access to the rows of a table."""

    of_texts = True

    def __init__(self, records: list[Record], left_out: list[str], table: Table) -> None:
        self.n_left_out = len(left_out)
        self._problems = [*left_out, *self._keep(records, table.path), *table.notes]

    def __getitem__(self, i: int) -> Sample:
        key, query, captions, meta, roles = self._record(i)
        data = query.encode()
        return Sample(i, key, data, QUERY_TYPE, tuple(captions), meta, roles=tuple(roles))

    def problems(self) -> list[str]:
        return self._problems
