"""Class lists: from a file or a list of names to the classes of an evaluation set.

A file is a text with a name a line ("n01440764 tench" and "0 tench" are read as key and name), a
CSV or TSV with a header or without, or JSON (a list, {number: name}, {folder: name}, {name:
number}, COCO's categories). Names meet the data like this:

1. any given name, or key, is a class of the data (whatever the case, underscores or blanks): all go
   by name, and a class of the data without a name is refused;
2. folders are numbers: a folder's number counts from 0 into the list (exactly 1 … n for n names:
   from 1);
3. folders are synsets and the names are ImageNet's 1,000 in their order: by synset;
4. else the classes in sorted order take the names in theirs, if there are as many.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlp.data.trees import class_name
from vlp.eval import imagenet
from vlp.eval.pictures import DataError
from vlp.schema import did_you_mean

_NAME_COLUMNS = ("class_name", "classname", "class", "name", "label", "category", "title")
_KEY_COLUMNS = (
    "folder", "synset", "wnid", "id", "index", "number", "class_id", "class_index", "label_id",
)  # fmt: skip
_LIST_KEYS = ("classes", "classnames", "class_names", "names", "categories")  # of a JSON file
_KEYED_LINE = re.compile(r"(n\d{8}|\d+)[\s:,]+(.+)")


@dataclass(frozen=True)
class ClassList:
    """Names in the order of their numbers; `keys`: what else each class is called (its folder or
    synset), or nothing.
    """

    names: list[str]
    keys: list[str] = field(default_factory=list)
    origin: str = "classes="  # what messages call it


def read_list(path: Path) -> ClassList:
    """A class list from a file; a DataError names the line or entry that cannot be one."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file with a class name a line")

    data = path.read_bytes()
    is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")  # as spreadsheets export
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None

    readers = {
        ".json": _from_json,
        ".csv": _from_table,
        ".tsv": _from_table,
    }
    read = readers.get(path.suffix.lower(), _from_lines)
    names, keys = read(text, path)
    return checked(ClassList(names, keys, str(path)))


def checked(class_list: ClassList) -> ClassList:
    """The same list without blank names at its end; a DataError names blank and repeated ones."""
    origin = class_list.origin
    # Two spellings of one accented letter are the same name.
    names = [" ".join(unicodedata.normalize("NFC", name).split()) for name in class_list.names]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise DataError(f"{origin} holds no class name")

    first: dict[str, int] = {}
    repeated = []
    for number, name in enumerate(names, 1):
        if not name:
            raise DataError(
                f"{origin}, line {number}: a blank class name; remove the line or fill it"
            )
        if name in first:
            repeated.append(f"{name!r} in lines {first[name]} and {number}")
        first.setdefault(name, number)

    # ImageNet's published lists call two of their classes alike.
    if repeated and len(names) != len(imagenet.synsets()):
        raise DataError(
            f"{origin} repeats class names: {'; '.join(repeated[:5])}; two classes cannot be "
            "told apart by one"
        )
    return ClassList(names, class_list.keys[: len(names)], origin)


# --- names to classes -----------------------------------------------------------------------------


def assign(present: Sequence[str], class_list: ClassList, where: str) -> dict[str, int]:
    """{class of the data: number in the list}, by the rules above; a DataError lists what has no
    name.
    """
    ordered = in_order(present)
    places = _places_by_name(ordered, class_list)
    if any(places.values()):
        unknown = [name for name in ordered if not places[name]]
        _refuse_unknown(unknown, ordered, class_list, where)
        return {name: _only(name, several, class_list) for name, several in places.items()}

    # No name of the list is a class: the data may count them (rule 2), or be ImageNet (rule 3).
    if all(name.isdecimal() for name in ordered):
        return _by_number(ordered, class_list, where)

    synset_numbers = _synset_numbers(ordered, class_list)
    if synset_numbers is not None:
        return synset_numbers

    # Rule 4: the names go to the classes in their order, if there are as many.
    if len(class_list.names) != len(ordered):
        raise DataError(
            f"{class_list.origin} lists {len(class_list.names)} names but {where} has "
            f"{len(ordered)} classes ({', '.join(ordered[:5])}, …), and none of the names is one "
            "of them; give a name for each, or use their names"
        )
    return {name: i for i, name in enumerate(ordered)}


def in_order(labels: Sequence[str]) -> list[str]:
    """The different classes among `labels`: numbers by their value, then names by the alphabet."""

    def numbers_first(label: str) -> tuple[int, int, str]:
        return (0, int(label), label) if label.isdecimal() else (1, 0, label)

    return sorted(dict.fromkeys(labels), key=numbers_first)


def _places_by_name(ordered: list[str], class_list: ClassList) -> dict[str, list[int]]:
    """Where the list has each class of the data, by its name or its key."""
    exact: dict[str, list[int]] = defaultdict(list)
    folded: dict[str, list[int]] = defaultdict(list)
    for place, entry in [*enumerate(class_list.names), *enumerate(class_list.keys)]:
        exact[entry].append(place)
        folded[_folded(entry)].append(place)

    # Its own spelling counts before any case, underscores and blanks.
    return {name: exact.get(name) or folded.get(_folded(name), []) for name in ordered}


def _folded(name: str) -> str:
    """A name without case, underscores, hyphens and doubled blanks."""
    return class_name(name.replace("-", " ")).casefold()


def _only(name: str, places: list[int], class_list: ClassList) -> int:
    """The one place of a class in the list; a DataError if there are several."""
    if len(set(places)) > 1:
        several = ", ".join(repr(class_list.names[place]) for place in places)
        raise DataError(
            f"the class {name!r} of the data may be any of {several} in {class_list.origin}; "
            "spell it as one of them"
        )
    return places[0]


def _refuse_unknown(
    unknown: list[str], ordered: list[str], class_list: ClassList, where: str
) -> None:
    """Raise DataError for classes of the data that the list does not name."""
    if not unknown:
        return

    # A misspelt name is likelier than a class that is none.
    hints = "; ".join(
        f"{name!r}{did_you_mean(class_name(name), class_list.names[:20])}" for name in unknown[:5]
    )
    raise DataError(
        f"{class_list.origin} lists {len(class_list.names)} names but {where} has {len(ordered)} "
        f"classes, {len(unknown)} of them unknown by name: {hints}. As some names are those of "
        "classes, all are taken by name: add or correct these"
    )


def _by_number(ordered: list[str], class_list: ClassList, where: str) -> dict[str, int]:
    """{class of the data: number in the list} where the classes are numbers."""
    # Exactly 1 … n are counted from 1; all else counts from 0.
    numbers = [int(name) for name in ordered]
    n_names = len(class_list.names)
    if numbers == list(range(1, n_names + 1)):
        return {name: int(name) - 1 for name in ordered}
    if numbers[-1] >= n_names:
        raise DataError(
            f"{where} numbers its classes up to {numbers[-1]}, but {class_list.origin} lists "
            f"{n_names} names, which count from 0; complete the list"
        )
    return {name: int(name) for name in ordered}


def _synset_numbers(ordered: list[str], class_list: ClassList) -> dict[str, int] | None:
    """{synset: number} where the data are synsets and the list can be ImageNet's 1,000 names."""
    synsets = imagenet.synsets()
    if len(class_list.names) != len(synsets):
        return None
    number = {synset: i for i, synset in enumerate(synsets)}
    return {name: number[name] for name in ordered} if number.keys() >= set(ordered) else None


# --- files ----------------------------------------------------------------------------------------


def _from_lines(text: str, path: Path) -> tuple[list[str], list[str]]:
    """(names, keys) of a text with a name a line, or a key and a name."""
    lines = [line.strip() for line in text.rstrip().split("\n")]
    matches = [match for line in lines if (match := _KEYED_LINE.fullmatch(line))]
    if len(matches) < len(lines):
        return lines, []

    # Every line begins with a number or synset: keys, unless the numbers do not count the lines.
    keys, names = [match[1] for match in matches], [match[2] for match in matches]
    if not keys[0].isdecimal():
        # Synsets come with their synonyms; the first is the name.
        return [name.split(",")[0] for name in names], keys

    if not _counts(keys):
        return lines, []
    return _numbered(dict(zip(map(int, keys), names)), path)


def _counts(keys: list[str]) -> bool:
    """Whether the numbers before the names count all lines, from 0 or 1: else they belong to the
    names ("2 euro").
    """
    numbers = sorted(int(key) for key in keys if key.isdecimal())
    return numbers in (list(range(len(keys))), list(range(1, len(keys) + 1)))


def _from_table(text: str, path: Path) -> tuple[list[str], list[str]]:
    """(names, keys) of a CSV or TSV, with a header or without."""
    separator = "\t" if path.suffix.lower() == ".tsv" else ","

    # A blank line at the end is no class; one in between is refused by `checked`.
    reader = csv.reader(io.StringIO(text.rstrip()), delimiter=separator)
    rows = [[cell.strip() for cell in row] for row in reader]

    # The first row is a header if one of its cells is a usual name for names.
    header = [cell.lower().replace(" ", "_") for cell in rows[0]] if rows else []
    name_column = _column_of(header, _NAME_COLUMNS)
    key_column = _column_of(header, _KEY_COLUMNS)
    if name_column is not None:
        rows = rows[1:]
    elif len(header) < 2:
        name_column, key_column = 0, None
    else:
        name_column, key_column = _columns_without_header(rows)

    # A comma inside a name without quotes would shift the columns unnoticed.
    short = next((i for i, row in enumerate(rows, 1) if row and len(row) != len(header)), None)
    if short is not None:
        raise DataError(
            f"{path}, row {short}: found {len(rows[short - 1])} fields, the first row has "
            f"{len(header)}"
        )

    # A blank line keeps its place, so that `checked` can name it.
    names = [row[name_column] if row else "" for row in rows]
    keys = []
    if key_column is not None:
        keys = [row[key_column] if row else "" for row in rows]
    if keys and _counts(keys):
        return _numbered(dict(zip(map(int, keys), names)), path)
    return names, keys


def _column_of(header: list[str], usual_names: Sequence[str]) -> int | None:
    """Where the header has the first of the usual names that it has at all."""
    for name in usual_names:
        if name in header:
            return header.index(name)
    return None


def _columns_without_header(rows: list[list[str]]) -> tuple[int, int]:
    """(column of names, column of keys): numbers are keys, else the first column is."""
    second_counts = all(len(row) > 1 and row[1].isdecimal() for row in rows)
    return (0, 1) if second_counts else (1, 0)


def _from_json(text: str, path: Path) -> tuple[list[str], list[str]]:
    """(names, keys) of a list or mapping, possibly below one of the usual keys."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None

    if isinstance(value, dict):
        # COCO keeps its categories beside images and annotations.
        inner = next((value[key] for key in _LIST_KEYS if key in value), None)
        if inner is None and len(value) == 1 and not next(iter(value)).isdecimal():
            # {set: [names]}, as clip_benchmark's files of a language are.
            (inner,) = value.values()
        value = inner if isinstance(inner, (list, dict)) else value
    if isinstance(value, dict):
        return _from_mapping(value, path)
    if not isinstance(value, list):
        raise DataError(
            f"{path} holds {type(value).__name__}, expected a list of names or a mapping"
        )
    return [_name(entry, path) for entry in value], []


def _from_mapping(value: dict[str, Any], path: Path) -> tuple[list[str], list[str]]:
    """(names, keys) of {name: number}, {number: name} or {folder: name}."""
    if value and all(type(number) is int for number in value.values()):
        return _numbered({number: name for name, number in value.items()}, path)

    names = [_name(entry, path) for entry in value.values()]
    if all(key.isdecimal() for key in value):
        return _numbered(dict(zip(map(int, value), names)), path)
    return names, list(value)


def _name(entry: Any, path: Path) -> str:
    """A name, also as the last of [synset, name] and as an entry's "name"."""
    if isinstance(entry, dict):
        entry = entry.get("name")
    if isinstance(entry, list) and entry:
        entry = entry[-1]
    if not isinstance(entry, str):
        raise DataError(f"{path}: found {entry!r}, expected the name of a class")
    return entry


def _numbered(by_number: dict[int, str], path: Path) -> tuple[list[str], list[str]]:
    """(names in the order of their numbers, no keys)."""
    # JSON's keys are in any order; what counts is the number.
    numbers = sorted(by_number)
    start = numbers[0]
    expected = range(start, start + len(numbers))
    if start not in (0, 1) or numbers != list(expected):
        gap = next((number for number in expected if number not in by_number), start)
        raise DataError(
            f"{path} numbers {len(numbers)} classes, but not from 0 without a gap (see number "
            f"{gap})"
        )
    return [by_number[number] for number in numbers], []
