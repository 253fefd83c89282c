"""Rules on fields of a sample's JSON: `similarity > 0.28`, `punsafe < .5`, `license in cc0,by`,
`origin present`.

A condition is parsed, never evaluated as code. Numbers are compared as numbers: a text that reads
as a number, as tables bring it, counts as one. With < <= > >= a value that is no number cannot be
compared; == and != also compare texts, true, false and null. A field may be a path: `exif.iso`.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from vlp.schema import did_you_mean

ORDERED: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(
    r"\s*(?P<field>[^<>=!]+?)\s*(?:(?P<sign><=|>=|==|!=|<|>)\s*(?P<value>[^<>=!].*?)?"
    r"|\s(?P<word>in|present|absent)(?:\s+(?P<list>.*?))?)\s*"
)
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
_NOWHERE = object()


class Asked(Protocol):
    """Something that is asked of a field of the samples' JSON."""

    @property
    def text(self) -> str: ...
    @property
    def field(self) -> str: ...
    @property
    def asks_number(self) -> bool: ...
    def can_be_asked(self, meta: dict[str, Any]) -> bool: ...


@dataclass(frozen=True)
class Condition:
    """One rule: what it asks of a sample's JSON."""

    text: str
    field: str
    sign: str  # < <= > >= == != in present absent
    values: tuple[Any, ...]  # one, several of `in`, none of `present` and `absent`

    def holds(self, meta: dict[str, Any]) -> bool | None:
        """Whether a sample fulfils it; None where the field is missing or its value cannot be
        compared so.
        """
        value = _look_up(meta, self.field)
        if self.sign == "present":
            return value is not _NOWHERE
        if self.sign == "absent":
            return value is _NOWHERE
        # A null can be equal to null, and to nothing else.
        if value is _NOWHERE or (value is None and None not in self.values):
            return None

        if self.sign in ORDERED:
            number = _number(value)
            return None if number is None else ORDERED[self.sign](number, self.values[0])

        # Of a list, one entry that is equal is enough.
        entries = value if isinstance(value, list) else [value]
        for wanted in self.values:
            if any(_same(entry, wanted) for entry in entries):
                return self.sign != "!="
        return self.sign == "!="

    @property
    def asks_number(self) -> bool:
        """Whether the field's value must be a number."""
        return self.sign in ORDERED

    def can_be_asked(self, meta: dict[str, Any]) -> bool:
        """Whether a sample has the field, and a value of it that can be compared so."""
        if self.sign in ("present", "absent"):
            return _look_up(meta, self.field) is not _NOWHERE
        return self.holds(meta) is not None


@cache
def parse(text: str) -> Condition:
    """A condition from the command line; raises ValueError."""
    match = _FORM.fullmatch(text)
    forms = (
        "FIELD < NUMBER (also <=, >, >=), FIELD == VALUE, FIELD != VALUE, FIELD in A,B, "
        "FIELD present or FIELD absent"
    )
    if not match:
        # A typing error must not become a rule that drops everything.
        raise ValueError(f"{text!r} is no condition; expected {forms}, such as 'similarity > 0.28'")

    sign = match["sign"] or match["word"]
    value = match["value"] or match["list"] or ""
    takes_value = sign not in ("present", "absent")
    if takes_value != bool(value):
        problem = "names a value" if value else "names no value"
        raise ValueError(f"{text!r} {problem}; expected {forms}")

    if sign in ORDERED:
        number = _number(value)
        if number is None:
            raise ValueError(
                f"{text!r} compares with {value!r}, which is no number; "
                "texts are compared with == or !="
            )
        return Condition(text, match["field"], sign, (number,))

    # Quotes keep a text; anything else is read as JSON would read it.
    if sign == "in":
        parts = value.split(",")
    else:
        parts = [value] if takes_value else []
    return Condition(text, match["field"], sign, tuple(_value(part) for part in parts))


def refuse(
    meta: dict[str, Any], keep: tuple[str, ...], drop: tuple[str, ...], counts: Counter[str]
) -> str:
    """Why a sample with this JSON is dropped, or "": it fails a condition of `keep`, or fulfils one
    of `drop`.

    Where a condition cannot be asked, because the field is missing or no number, `keep` drops the
    sample and `drop` keeps it; `counts` learns of those that stay.
    """
    for text in keep:
        held = parse(text).holds(meta)
        if not held:
            reason = "no such value" if held is None else "not so"
            return f"--keep {text}: {reason}"

    # What is missing cannot be bad; how often it is missing is shown.
    for text in drop:
        held = parse(text).holds(meta)
        if held:
            return f"--drop {text}"
        if held is None:
            counts[f"kept: --drop {text}: no such value"] += 1
    return ""


def refuse_unknown(asked: Iterable[Asked], metas: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for what can be asked of no sample; reads only as far as it must."""
    # Most often the first sample answers all of them, and one is read.
    waiting = list(asked)
    if not waiting:
        return
    fields: set[str] = set()
    for n, meta in enumerate(metas):
        if n < 1000:  # the error names them; samples of one data set mostly have the same
            fields |= fields_of(meta)
        waiting = [condition for condition in waiting if not condition.can_be_asked(meta)]
        if not waiting:
            return

    condition = waiting[0]
    is_known = condition.field in fields
    why = "has a number in it" if is_known and condition.asks_number else "has that field"
    near = "" if is_known else did_you_mean(condition.field, fields)
    if near.startswith("; known"):
        near = ""  # the list follows
    raise ValueError(
        f"{condition.text!r}: no sample {why}{near}; the fields are {', '.join(sorted(fields))}"
    )


def number_of(meta: dict[str, Any], field: str) -> float | None:
    """The number in a field, the largest of a list; None where there is none."""
    value = _look_up(meta, field)
    entries = value if isinstance(value, list) else [value]
    numbers = [_number(entry) for entry in entries]
    return max((number for number in numbers if number is not None), default=None)


def fields_of(meta: dict[str, Any]) -> set[str]:
    """The names that a condition may use for this JSON."""
    names = set(meta)
    for name, value in meta.items():
        if isinstance(value, dict):
            names |= {f"{name}.{key}" for key in value}
    return names


def _look_up(meta: dict[str, Any], field: str) -> Any:
    if field in meta:  # a name that holds a dot itself
        return meta[field]

    name, dot, rest = field.partition(".")
    inner = meta.get(name)
    return _look_up(inner, rest) if dot and isinstance(inner, dict) else _NOWHERE


def _value(text: str) -> Any:
    """A text of the command line as a JSON value; quotes keep it a text."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]

    number = _number(text)
    return text if number is None else number


def _number(value: Any) -> float | None:
    """A number, or a text that reads as one; None for all else. Not a number (NaN) compares with
    nothing.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        # Tables bring numbers as texts.
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if number != number else number


def _same(entry: Any, value: Any) -> bool:
    if isinstance(value, str):
        return entry == value
    if isinstance(value, float):
        return _number(entry) == value
    return entry is value  # true, false and null
