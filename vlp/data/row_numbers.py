"""The numbers of a sample's JSON that terms read, by the rows of `vlp.fields` that name a field of
it.

A number that cannot be used costs its sample, not the run: it raises ValueError.
"""

from __future__ import annotations

from typing import Any

from vlp.data import wrong_captions
from vlp.data.row import Row
from vlp.data.sources import Source
from vlp.fields import LABELS, Field
from vlp.types import Sample

_LARGEST = 3e38  # that float32 can hold


def offered(sources: list[Source], widths: dict[str, int]) -> dict[str, int]:
    """The labels that every sample has, with their width; `widths` of the text fields."""
    names = frozenset.intersection(*(source.labels for source in sources))

    labels = {}
    for name, row in LABELS.items():
        if row.json not in names:
            continue

        if row.beside:
            width = widths.get(row.beside, 0)
        elif is_one_number(row):
            width = 1
        else:  # all samples have as many as the first
            width = len(sources[0][0].meta[row.json])
        if width:
            labels[name] = width
    return labels


def is_one_number(row: Field) -> bool:
    """Whether the JSON holds a number instead of a list."""
    return row.batch_shape == "b"


def check(sample: Sample, widths: dict[str, int]) -> None:
    """Raise ValueError for numbers that a term reads and cannot use."""
    for name, width in widths.items():
        row = LABELS.get(name)
        if row is None or not row.json:
            continue

        if is_one_number(row):
            _number(sample, row)
        elif not row.beside:
            _numbers(sample, row, width)
        else:
            # One for each text of the sample, whichever caption it belongs to.
            n_texts = len(_texts_beside(sample, row))
            if n_texts:
                _numbers(sample, row, n_texts)


def of_row(row: Row, name: str, width: int) -> float | list[float]:
    """The label of a row: a number, or `width` of them; beside texts, 0 where there is no text."""
    field = LABELS[name]
    if is_one_number(field):
        return _number(row.sample, field)
    if not field.beside:
        return _numbers(row.sample, field, width)

    # As the texts are: those of the row's caption, then padding.
    wrong, places = row.wrong(field.beside)
    places = places[:width]
    values = _numbers(row.sample, field, len(wrong.texts)) if places else []

    return [values[place] for place in places] + [0.0] * (width - len(places))


def _texts_beside(sample: Sample, row: Field) -> list[str]:
    return wrong_captions.read(sample.meta, row.beside, sample.captions).texts


def _number(sample: Sample, row: Field) -> float:
    value = sample.meta[row.json]
    number = _finite(value)

    if number is None or number < row.at_least:
        expected = "a finite one"
        if row.at_least > -_LARGEST:
            expected = f"a number >= {row.at_least:g} and below 3e38"
        raise ValueError(f"the {row.json} is {str(value)[:20]}, expected {expected}")
    return number


def _numbers(sample: Sample, row: Field, count: int) -> list[float]:
    entries = sample.meta[row.json]
    if len(entries) != count:
        each = f"{row.json.removesuffix('s')}, as the first sample has"
        if row.beside:
            each = f"of its {row.beside}"
        raise ValueError(
            f"{len(entries)} numbers in {row.json!r}, expected {count}: one for each {each}"
        )

    values = []
    for entry in entries:
        number = _finite(entry)
        if number is None:  # NaN, infinity, or beyond float32
            odd = str(entry)[:20]
            raise ValueError(f"a number in {row.json!r} is {odd}, expected a finite one")
        values.append(number)
    return values


def _finite(value: Any) -> float | None:
    """A number of a JSON that float32 can hold, else None."""
    # A JSON may hold whole numbers of any length, NaN and Infinity.
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None  # not NaN
