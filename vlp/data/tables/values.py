"""What stands in a table's cells: captions, numbers, truth values and lists, as a shard's JSON can
hold them.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from vlp.data.captions import text_in, written_list

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_DECIMAL = re.compile(
    r"""
    -? (0|[1-9]\d*)? \. \d+ ([eE][+-]?\d+)?  # 0.5, .5, 0.5e3
    | -? (0|[1-9]\d*) \. ([eE][+-]?\d+)?     # 5., 5.e3
    | -? (0|[1-9]\d*) [eE] [+-] \d+           # 5e-3, not 1e5: that may be an id
    """,
    re.VERBOSE,
)
_LARGEST = 1 << 53  # beyond it, readers that keep numbers as doubles change an id
_LISTED = 20  # values of a column that a message lists
_NOTHING = frozenset({"nan", "na", "n/a", "null", "none", "<na>"})
_TRUTH = {"true": True, "false": False}
# Of a dialogue: LLaVA's form, the chat form.
_TURN_KEYS = (("from", "value"), ("role", "content"))
_ANSWERING = ("gpt", "assistant", "model")


class NoText(ValueError):
    """A value that holds no captions."""


def texts(value: Any) -> list[str]:
    """The captions in a value: a text, a list of texts or of {raw | caption | text | sentence}, or
    a dialogue's answers.

    A text that is written as a list, `["a dog", "a cat"]`, is that list. Empty ones are left out;
    NoText for all else.
    """
    if isinstance(value, str):
        value = written_list(value.strip())
    if value is None:
        return []

    entries = value if isinstance(value, list) else [value]
    # The questions of a dialogue are no captions.
    if _is_dialogue(entries):
        entries = answers(entries)

    result = []
    for entry in entries:
        if entry is None:
            continue
        text = text_in(entry)
        if text is None:
            raise NoText(f"found {str(entry)[:80]!r}, expected a text or a list of texts")
        if text:
            result.append(text)
    return result


def _is_dialogue(entries: list[Any]) -> bool:
    if not entries or not all(isinstance(turn, dict) for turn in entries):
        return False

    first = entries[0]
    return any(speaker in first and content in first for speaker, content in _TURN_KEYS)


def answers(value: Any) -> list[str]:
    """What the model says in a dialogue (LLaVA's `conversations`, `messages` of chats); nothing in
    any other value.
    """
    if not isinstance(value, list):
        return []
    turns = [turn for turn in value if isinstance(turn, dict)]

    result = []
    for turn in turns:
        for speaker, content in _TURN_KEYS:
            if turn.get(speaker) in _ANSWERING and content in turn:
                result.append(_text_of_turn(turn[content]))
    return result


def _text_of_turn(content: Any) -> str:
    """The text of a turn: as it is, or in parts of which some may be images."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []

    texts_of_parts = [part.get("text") for part in parts if isinstance(part, dict)]
    return " ".join(text for text in texts_of_parts if isinstance(text, str))


def jsonable(value: Any) -> Any:
    """A value of a file as JSON holds it: dates as ISO texts, decimals as numbers, NaN and infinity
    as nothing.

    Lone halves of UTF-16 pairs, which no file can store, become U+FFFD.
    """
    if isinstance(value, str):
        return repaired(value)
    if value is None or isinstance(value, (bool, int)):
        return value
    # JSON has no NaN: other readers refuse a file that holds one.
    if isinstance(value, float):
        return value if math.isfinite(value) else None

    if isinstance(value, dict):
        return {repaired(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]

    # What parquet holds besides.
    if isinstance(value, Decimal):
        return _from_decimal(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("bytes")
    return str(value)


def repaired(text: str) -> str:
    """The text with lone surrogates replaced and split pairs joined."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _from_decimal(value: Decimal) -> Any:
    """A decimal as JSON holds it; a whole one that a double would change, as a text."""
    if not value.is_finite():
        return None

    is_whole = value == value.to_integral_value()
    if not is_whole:
        return float(value)
    return int(value) if abs(value) < _LARGEST else str(value)


def converter(cells: Iterable[str]) -> Callable[[str], Any]:
    """How the cells of one column of a text file become JSON values; the rule looks at the whole
    column.

    All whole numbers (no leading zeros, below 2⁵³) are ints; all numbers are floats, and "nan",
    "NA", "null" among them nothing; all true or false are truth values; all lists or mappings in
    JSON are those. Everything else stays text, also "1e5" without a sign, which may be an id.
    """
    values = {cell for cell in cells if cell}
    filled = {cell for cell in values if cell.lower() not in _NOTHING}
    if not filled:
        return str
    if all(cell.lower() in _TRUTH for cell in values):
        return _truth_value

    whole = {cell for cell in filled if _WHOLE.fullmatch(cell)}
    if all(cell in whole or _DECIMAL.fullmatch(cell) for cell in filled):
        # A long id that became a double would be another id.
        are_exact = all(len(cell) < 20 and abs(int(cell)) < _LARGEST for cell in whole)
        return _number if are_exact else str

    if all(cell[0] in "[{" and _parsed(cell) is not None for cell in values):
        return _parsed
    return str


def _truth_value(cell: str) -> bool:
    return _TRUTH[cell.lower()]


def _number(cell: str) -> int | float | None:
    if cell.lower() in _NOTHING:
        return None

    number = int(cell) if _WHOLE.fullmatch(cell) else float(cell)
    return number if math.isfinite(number) else None


def _parsed(cell: str) -> Any:
    try:
        return jsonable(json.loads(cell))
    except (ValueError, RecursionError):
        return None


def equals(value: Any, wanted: Any) -> bool:
    """Whether a cell has the value that a person asks for, or one of a list: as text, truth value,
    or the same number.
    """
    if isinstance(wanted, list):
        return any(equals(value, one) for one in wanted)
    if value is None:
        return wanted is None or wanted == ""

    # A person writes "1" for 1.0, and "True" for what JSON holds as true.
    one, other = shown(value).strip(), shown(wanted).strip()
    if one == other:
        return True
    if one.lower() in _TRUTH and other.lower() in _TRUTH:
        return one.lower() == other.lower()
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def shown(value: Any) -> str:
    """A value as a person writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def asked(wanted: Any) -> str:
    """What a person asks for, for messages."""
    choices = wanted if isinstance(wanted, list) else [wanted]
    return " or ".join(repr(shown(choice)) for choice in choices)


def counted(cells: Iterable[Any]) -> str:
    """The values of a column with their numbers, the commonest first, for messages."""
    counts: Counter[str] = Counter()
    for cell in cells:
        counts["nothing" if cell is None else shown(cell)] += 1

    common = ", ".join(f"{value} ({n})" for value, n in counts.most_common(_LISTED))
    return f"{common}, …" if len(counts) > _LISTED else common
