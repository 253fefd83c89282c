"""The numbers of a sample's JSON that terms read, by the rows of `vlp.fields` that name a field of
it.

A number that cannot be used costs its sample, not the run: it raises ValueError.

Concepts come in two forms, and a data set's first sample tells which: weights of all concepts, or
the numbers of those that are there, whole and each once, few of many thousand. Beside numbers there
may be their weights, `concept_weights`; without them each weighs 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlp.config import Data
from vlp.data import wrong_captions
from vlp.data.row import Row
from vlp.data.sources import Source
from vlp.fields import LABELS, Field
from vlp.types import Sample

_LARGEST = 3e38  # that float32 can hold
MOST_CONCEPTS = 64  # N, that a sample may name
_CONCEPTS, _WEIGHTS = "concepts", "concept_weights"  # fields of the JSON
_ANY_NUMBER = 1 << 24  # numbers of concepts are below it, as float32 holds them


def with_form_of_concepts(data: Data, sources: list[Source]) -> Data:
    """The section `data` whose `concepts` says which form those of the samples have: 0 for weights,
    else what their numbers are below. ValueError for a first sample that may be of either.
    """
    if not all(_CONCEPTS in source.labels for source in sources):
        return data

    sample = sources[0][0]
    first = sample.meta[_CONCEPTS]
    are_numbers = all(type(entry) is int for entry in first) and len(set(first)) == len(first)

    # Two concepts with the weights 1 and 0 would be the numbers of both.
    names_all = are_numbers and first and sorted(first) == list(range(data.concepts or 0))
    if names_all and _WEIGHTS not in sample.meta:
        raise ValueError(
            f"the first sample's {_CONCEPTS!r} are {str(first)[:60]}, which may be weights of all "
            f"{data.concepts} concepts or their numbers; write weights with a point (1.0), or give "
            f"{_WEIGHTS!r} beside numbers"
        )
    return replace(data, concepts=(data.concepts or _ANY_NUMBER) if are_numbers else 0)


def offered(sources: list[Source], widths: dict[str, int], data: Data) -> dict[str, int]:
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
        elif _is_named(row, data):
            width = MOST_CONCEPTS
        else:  # all samples have as many as the first
            width = len(sources[0][0].meta[row.json])
        if width:
            labels[name] = width
    return labels


def is_one_number(row: Field) -> bool:
    """Whether the JSON holds a number instead of a list."""
    return row.batch_shape == "b"


def _is_named(row: Field, data: Data) -> bool:
    """Whether the JSON holds the numbers of entries instead of all entries' weights."""
    return row.json == _CONCEPTS and bool(data.concepts)


def check(sample: Sample, widths: dict[str, int], data: Data) -> None:
    """Raise ValueError for numbers that a term reads and cannot use."""
    for name, width in widths.items():
        row = LABELS.get(name)
        if row is None or not row.json:
            continue

        if is_one_number(row):
            _number(sample, row)
        elif _is_named(row, data):
            _concepts(sample, data)
        elif not row.beside:
            _numbers(sample, row, width)
        else:
            # One for each text of the sample, whichever caption it belongs to.
            n_texts = len(_texts_beside(sample, row))
            if n_texts:
                _numbers(sample, row, n_texts)


def of_row(row: Row, name: str, width: int, data: Data) -> float | list[Any]:
    """The label of a row: a number, or `width` of them; beside texts, 0 where there is no text. Of
    named concepts each is a number and a weight.
    """
    field = LABELS[name]
    if is_one_number(field):
        return _number(row.sample, field)
    if _is_named(field, data):
        pairs = _concepts(row.sample, data)
        return pairs + [[0.0, 0.0]] * (width - len(pairs))
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


def _concepts(sample: Sample, data: Data) -> list[list[float]]:
    """Number and weight of each concept that a sample names."""
    numbers = sample.meta[_CONCEPTS]
    if len(numbers) > MOST_CONCEPTS:
        raise ValueError(
            f"{len(numbers)} numbers in {_CONCEPTS!r}, expected at most {MOST_CONCEPTS} of a sample"
        )
    for number in numbers:
        if type(number) is not int or not 0 <= number < (data.concepts or 0):
            raise ValueError(
                f"{str(number)[:20]} in {_CONCEPTS!r} is no number of a concept, expected whole "
                f"ones from 0 to {(data.concepts or 0) - 1}, as the first sample has, below "
                "model.heads.concepts"
            )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"a concept stands twice in {_CONCEPTS!r}: {str(numbers)[:60]}")

    stated = sample.meta.get(_WEIGHTS)
    if stated is None:
        return [[float(number), 1.0] for number in numbers]
    weights = [_finite(weight) for weight in stated] if _are_numbers(stated) else []
    if len(weights) != len(numbers) or any(weight is None or weight < 0 for weight in weights):
        raise ValueError(
            f"{_WEIGHTS!r} is {str(stated)[:40]}, expected a number >= 0 for each of the "
            f"{len(numbers)} concepts"
        )
    return [[float(number), weight] for number, weight in zip(numbers, weights) if weight]


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value)


def _finite(value: Any) -> float | None:
    """A number of a JSON that float32 can hold, else None."""
    # A JSON may hold whole numbers of any length, NaN and Infinity.
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _LARGEST else None  # not NaN
