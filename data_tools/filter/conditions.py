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
from typing import Any

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
        found = _look_up(meta, self.field)
        if self.sign in ("present", "absent"):
            return (found is not _NOWHERE) == (self.sign == "present")
        if found is _NOWHERE or (found is None and None not in self.values):
            return None
        if self.sign in ORDERED:
            number = _number(found)
            return None if number is None else ORDERED[self.sign](number, self.values[0])
        entries = found if isinstance(found, list) else [found]
        equal = any(_same(entry, value) for entry in entries for value in self.values)
        return not equal if self.sign == "!=" else equal


@cache
def parse(text: str) -> Condition:
    """A condition from the command line; raises ValueError."""
    match = _FORM.fullmatch(text)
    forms = "FIELD < NUMBER (also <=, >, >=), FIELD == VALUE, FIELD != VALUE, FIELD in A,B, FIELD present or FIELD absent"
    if not match:
        raise ValueError(f"{text!r} is no condition; expected {forms}, such as 'similarity > 0.28'")
    sign, told = match["sign"] or match["word"], match["value"] or match["list"] or ""
    if (sign in ("present", "absent")) == bool(told):
        raise ValueError(
            f"{text!r} {'names a value' if told else 'names no value'}; expected {forms}"
        )
    if sign in ORDERED:
        number = _number(told)
        if number is None or number != number:
            raise ValueError(
                f"{text!r} compares with {told!r}, which is no number; texts are compared with == or !="
            )
        return Condition(text, match["field"], sign, (number,))
    parts = told.split(",") if sign == "in" else [told] if told else []
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
            return f"--keep {text}: {'no such value' if held is None else 'not so'}"
    for text in drop:
        held = parse(text).holds(meta)
        if held:
            return f"--drop {text}"
        if held is None:
            counts[f"kept: --drop {text}: no such value"] += 1
    return ""


def refuse_unknown(conditions: tuple[str, ...], metas: Iterable[dict[str, Any]]) -> None:
    """Raise ValueError for a condition that can be asked of no sample; reads only as far as it
    must.
    """
    waiting, fields = list(map(parse, conditions)), set()
    for n, meta in enumerate(metas):
        if n < 1000:
            fields |= fields_of(meta)
        waiting = [
            c
            for c in waiting
            if c.sign not in ("present", "absent") or _look_up(meta, c.field) is _NOWHERE
        ]
        waiting = [c for c in waiting if c.sign in ("present", "absent") or c.holds(meta) is None]
        if not waiting:
            return
    if waiting:
        condition = waiting[0]
        why = (
            "has a number in it"
            if condition.field in fields and condition.sign in ORDERED
            else "has that field"
        )
        near = "" if condition.field in fields else did_you_mean(condition.field, fields)
        if near.startswith("; known"):
            near = ""  # the list follows
        raise ValueError(
            f"{condition.text!r}: no sample {why}{near}; the fields are {', '.join(sorted(fields))}"
        )


def fields_of(meta: dict[str, Any]) -> set[str]:
    """The names that a condition may use for this JSON."""
    inner = {
        f"{name}.{key}" for name, value in meta.items() if isinstance(value, dict) for key in value
    }
    return set(meta) | inner


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
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return None if number != number else number


def _same(found: Any, value: Any) -> bool:
    if isinstance(value, str):
        return found == value
    if isinstance(value, float):
        return _number(found) == value
    return found is value
