"""Rows of a table as items: one image each, with all its captions and other columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, compress
from pathlib import Path
from typing import Any

from vlp.data.tables import columns, fetched, values
from vlp.data.tables.columns import Chosen, TableOptions
from vlp.data.tables.files import option
from vlp.data.tables.names import only
from vlp.data.tables.read import Table, read

_SHOWN = 20


@dataclass
class Item:
    """One image of a table.

    Rows that name the same image are one item: a later row adds the captions that are not there
    yet. The list of one row stays as it is, since fields such as `negatives_of` count its entries,
    and published sets their captions.
    """

    image: str  # the name as the table gives it
    row: int  # line or number of the (first) row, counted from 1 with any header
    captions: list[str] = field(default_factory=list)
    # The first row's other columns; "class" if there is one.
    meta: dict[str, Any] = field(default_factory=dict)
    label: Any = None  # the class as the table gives it, a name or a number
    # The number of each caption's column among those of captions; empty: there is one column.
    columns: list[int] = field(default_factory=list)

    @property
    def class_name(self) -> str | None:
        return self.meta.get("class")


@dataclass
class Listing:
    """The images of a table, and what is to be told about reading it."""

    table: Table
    chosen: Chosen
    items: list[Item]
    # Sorted; of all rows, also those that `where` leaves out: parts of a set number them alike.
    classes: list[str]
    problems: list[str]  # a line for each row that cannot be used
    notes: list[str]

    def place(self, item: Item) -> str:
        """Where in the file an item stands, for messages."""
        return self.table.place(item.row)

    def __str__(self) -> str:
        """Which columns were taken and which are carried along, as tools tell it."""
        taken = (self.chosen.image, *self.chosen.captions, self.chosen.label)
        rest = [name for name in self.table.columns if name not in taken]
        if not rest:
            return str(self.chosen)
        return f"{self.chosen}; left in the JSON: {', '.join(rest)}"


def items(path: str | Path, options: TableOptions, split: str = "") -> Listing:
    """The images of a table that fulfil `options.where`, and belong to `split` where it has such a
    column.

    Raises ValueError for what makes the whole table unusable, OSError. Rows that cannot be used are
    in `problems`.
    """
    table = read(path, options)
    if options.rows:
        n_rows = len(table.rows)
        table.rows = table.rows[options.row_range]
        if not table.rows:
            raise ValueError(
                f"{table.path} has {n_rows} rows, none of them in rows: {options.rows}"
            )

    sample = [row for _, row in table.rows[:_SHOWN]]
    chosen = columns.choose(table.columns, sample, options, table.path)
    if not options.named_captions:
        _refuse_dialogues(table, chosen)

    if chosen.image == fetched.KEY and fetched.is_of_fetched(table.columns):
        n_rows = len(table.rows)
        table.rows, lost = fetched.succeeded(table.rows)
        if lost:
            n_lost = n_rows - len(table.rows)
            table.notes.append(f"{table.path}: {n_lost:,} rows were not fetched ({lost})")

    conditions = {}
    for name, value in options.where.items():
        conditions[columns.column(table.columns, name, table.path)] = value
    split_column = columns.split_column(table.columns)
    if split and split_column:
        conditions.setdefault(split_column, split)

    listing = _gather(table, chosen, conditions)
    if options.only:
        _keep_listed(listing, options.only)

    if not listing.items and listing.problems:
        raise ValueError("no row can be used:\n" + "\n".join(listing.problems[:10]))
    if not listing.items:
        _refuse_nothing(table, conditions)

    # What is read may be other than what was meant: the user is told, once.
    if listing.items[0].image.startswith(("http://", "https://")):
        listing.notes.append(
            f"{table.path}: {chosen.image} holds addresses; images are looked for under the names "
            "at their ends (img2dataset fetches what is not there yet)"
        )
    if split_column and split_column not in conditions:
        splits = [row.get(split_column) for _, row in table.rows]
        if len(set(map(values.shown, splits))) > 1:
            listing.notes.append(
                f"{table.path}: rows of all splits are taken together ({values.counted(splits)}); "
                "where chooses some"
            )
    return listing


def _keep_listed(listing: Listing, path: str) -> None:
    """Only the items that a list names; names that mean none are noted."""
    # A list that names none of the images is of another data set.
    n_before = len(listing.items)
    listing.items, lost = only(listing.items, path)
    if n_before and not listing.items:
        raise ValueError(
            f"no name in {path} is that of an image in {listing.table.path}; "
            f"the first is {lost[0]!r}"
        )

    if lost:
        listing.notes.append(
            f"{len(lost)} names in {path} are of no image in {listing.table.path} "
            f"(the first: {lost[0]!r})"
        )


def _gather(table: Table, chosen: Chosen, conditions: dict[str, Any]) -> Listing:
    """One item for each image of the rows that fulfil the conditions."""
    result = Listing(table, chosen, [], [], list(table.problems), list(table.notes))
    taken = (chosen.image, *chosen.captions, chosen.label)
    kept_columns = [name for name in table.columns if name not in taken]
    typed = table.converters([chosen.label, *kept_columns] if chosen.label else kept_columns)

    by_image: dict[str, Item] = {}
    classes: set[Any] = set()
    differing: Counter[str] = Counter()

    for number, row in table.rows:
        label = typed[chosen.label](row.get(chosen.label)) if chosen.label else None
        if isinstance(label, (list, dict)):
            result.problems.append(
                f"{table.place(number)}: {chosen.label} is {str(label)[:60]}, expected one class"
            )
            continue
        # Before the conditions: parts of a set must number its classes alike.
        if label is not None:
            classes.add(label)
        if not all(values.equals(row.get(column), wanted) for column, wanted in conditions.items()):
            continue

        try:
            item = _item(row, number, chosen, label)
        except values.NoText as problem:
            result.problems.append(f"{table.place(number)}: {problem}")
            continue
        for name in kept_columns:
            value = row.get(name)
            typed_value = None if value is None else typed[name](value)
            if typed_value is not None:
                item.meta[name] = typed_value
        if label is not None:
            item.meta["class"] = values.shown(label)

        # The first row of an image is its item.
        earlier = by_image.setdefault(item.image, item)
        if earlier is item:
            continue
        contradiction = join(earlier, item)
        if contradiction:
            result.problems.append(f"{table.place(number)}: {contradiction}")
        for name in kept_columns:
            if earlier.meta.get(name) != item.meta.get(name):
                differing[name] += 1

    captions = chain.from_iterable(item.captions for item in by_image.values())
    empty_words = Counter(filter(_says_nothing, captions))
    if empty_words:
        words = ", ".join(f"{word!r} ({n:,})" for word, n in empty_words.most_common(5))
        result.notes.append(
            f"{table.path}: captions that stand for none are taken as they are written: {words}; "
            "empty the cells to leave them out"
        )
    if differing:
        names = ", ".join(list(differing)[:5])
        result.notes.append(
            f"{table.path}: rows of one image differ in {names}; the first row's values are kept"
        )
    result.items = list(by_image.values())
    result.classes = [values.shown(label) for label in sorted(classes, key=_class_order)]
    return result


def _says_nothing(caption: str) -> bool:
    """Whether a caption is what programs write for a value that is not there."""
    return caption.casefold() in ("nan", "none", "null", "na", "n/a", "<na>")


def _item(row: dict[str, Any], number: int, chosen: Chosen, label: Any) -> Item:
    """One row, its JSON with the image's name only; raises NoText for one without an image name or
    with captions that are no texts.
    """
    name = row.get(chosen.image)
    if isinstance(name, list) and len(name) == 1:
        name = name[0]  # chats list their images
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)  # an id; the archive knows the extension
    if name is None or name == "":
        raise values.NoText(f"the column {chosen.image!r} is empty, expected an image's name")
    if not isinstance(name, str) or not name.strip():
        raise values.NoText(f"image is {name!r}, expected a name in the column {chosen.image!r}")

    captions: list[str] = []
    places: list[int] = []
    for place, column in enumerate(chosen.captions):
        try:
            captions += values.texts(row.get(column))
        except values.NoText as error:
            raise values.NoText(f"{column}: {error}") from None
        places += [place] * (len(captions) - len(places))

    image = name.strip()
    several = len(chosen.captions) > 1
    meta = {chosen.image: image}
    return Item(image, number, captions, meta, label, places if several else [])


def join(item: Item, other: Item) -> str:
    """Give an item the captions of another one of its image; returns what contradicts, or ""."""
    # Compared with the captions before: a list keeps its own repetitions, which numbers may count.
    is_new = [caption not in item.captions for caption in other.captions]
    item.captions = item.captions + list(compress(other.captions, is_new))
    item.columns = item.columns + list(compress(other.columns, is_new))

    if item.label is None:
        item.label = other.label
        if "class" in other.meta:
            item.meta["class"] = other.meta["class"]
    if other.label in (None, item.label):
        return ""
    return (
        f"image {item.image!r} is of the class {other.label!r} here and of {item.label!r} in row "
        f"{item.row}"
    )


def _class_order(label: Any) -> tuple[bool, int, str]:
    """Numbers by value, before names."""
    text = values.shown(label)
    is_number = text.isdecimal()
    return (not is_number, int(text) if is_number else 0, text)


def _refuse_dialogues(table: Table, chosen: Chosen) -> None:
    """The answer of a dialogue with one turn is a caption; several answers are none unless a person
    says so.
    """
    for number, row in table.rows:
        for name in chosen.captions:
            n_answers = len(values.answers(row.get(name)))
            if n_answers > 1:
                raise ValueError(
                    f"{table.place(number)}: {name} is a dialogue with {n_answers} answers, which "
                    "are no captions of the whole image; to take every answer as one: "
                    f"{option('caption_columns', name)}"
                )


def _refuse_nothing(table: Table, conditions: dict[str, Any]) -> None:
    """Raise for a table of which no row is left, with the values that there are."""
    if not conditions:
        raise ValueError(f"{table.path} has no rows")

    wanted = []
    there = []

    for name, value in conditions.items():
        wanted.append(f"{name} = {values.asked(value)}")
        cells = [row.get(name) for _, row in table.rows]
        there.append(f"{name} holds {values.counted(cells)}")
    raise ValueError(f"{table.path} has no row with {' and '.join(wanted)}; {'; '.join(there)}")
