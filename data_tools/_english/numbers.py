"""Counts in captions: the number words and digits two to ten where they count something, and their
exchange.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlp.data_tools._english.shuffles import FUNCTION_WORDS
from vlp.data_tools._english.words import Word, each_word, edit, is_plural

NUMBERS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10,
}  # fmt: skip
_NAMES = {n: word for word, n in NUMBERS.items()}
# Whole words only ("often" holds "ten"), and no part of a longer number, time, price, range or
# compound ("two-story").
_NUMBER = re.compile(
    rf"(?<![\w.:/$€£#%'’-])(?:{'|'.join(NUMBERS)}|10|[2-9])(?![\w:/%'’-]|[.,]\d)", re.I
)
_BOUNDS = (
    "at ?least|at ?most|more than|less than|fewer than|up to|over|about|around|almost|nearly"
    "|roughly|the other|another"
)
_BOUND = re.compile(rf"\b({_BOUNDS})\s+$", re.I)
_BOUND_AFTER = re.compile(r"\s*(?:\w+\s+){1,3}(at ?most|at ?least|or (more|less|fewer))\b", re.I)
_RANGE_AFTER = re.compile(rf"\s*(-|–|,|or|to)\s*({'|'.join(NUMBERS)}|\d)", re.I)
_RANGE_BEFORE = re.compile(rf"({'|'.join(NUMBERS)}|one|\d)\s*(-|–|or|to)\s*$", re.I)
_NAMES_OF = (
    "number|no|nr|route|bus|train|highway|gate|platform|page|channel|level|room|flight|grade|size"
    "|age"
)
_NAMED = re.compile(rf"\b({_NAMES_OF})\.?\s+$", re.I)
_UNIT_NAMES = """
years feet inches miles hours minutes seconds dollars cents degrees percent pounds meters times
days weeks months ways halves stories kilometers yards ounces colors
"""
_UNITS = frozenset(_UNIT_NAMES.split())
# characters on either side that say what a number is; all of a long text at every number takes
# minutes
_NEAR = 60


@dataclass(frozen=True)
class Count:
    """A number that counts something: `head` is the counted noun."""

    start: int
    end: int
    value: int
    head: str


def counts(caption: str) -> tuple[list[Count], list[str]]:
    """The counts of a caption, and for every number that is none, why not."""
    exact: list[Count] = []
    refused: list[str] = []
    for match in _NUMBER.finditer(caption):
        # A misread number makes a counterfactual that is true: what is unclear is refused.
        head = _head(caption, match.end())
        reason = _why_not(caption, match, head)
        if reason:
            refused.append(reason)
        else:
            value = NUMBERS.get(match[0].lower()) or int(match[0])
            exact.append(Count(match.start(), match.end(), value, head))
    return exact, refused


def _why_not(caption: str, match: re.Match[str], head: str) -> str:
    """Why a number counts nothing exactly, or ""."""
    before = caption[max(0, match.start() - _NEAR) : match.start()]
    after = caption[match.end() : match.end() + _NEAR]

    # In this order: a number may have several of these reasons, and the first is counted.
    if _BOUND.search(before) or _BOUND_AFTER.match(after):
        return "a bound or part, no exact number"
    if _RANGE_AFTER.match(after) or _RANGE_BEFORE.search(before):
        return "a range"
    if _NAMED.search(before):
        return "a name or label"
    if re.search(r"\d\s+$", before) or re.match(r"\s*(\d|½)", after):
        return "part of a longer number"
    if head in _UNITS:
        return "a measure or the like"
    return "" if head else "no plural noun after it"


def exchange(caption: str, counted: list[Count], value: int) -> str:
    """The caption with another number at these places, as a word or digits as before; a and an are
    corrected.
    """
    changes = []
    for count in counted:
        # Digits stay digits: "2 dogs" becomes "5 dogs".
        written = caption[count.start : count.end]
        new = str(value) if written.isdigit() else _NAMES[value]

        changes.append((count.start, count.end, new))
    return edit(caption, changes)


def counterfactuals(caption: str, counted: list[Count]) -> list[str]:
    """The caption with each of the eight other numbers from two to ten in the place of its one
    number.
    """
    return [exchange(caption, counted, n) for n in _NAMES if n != counted[0].value]


def _head(caption: str, start: int) -> str:
    """The counted noun of the phrase that starts at `start`: its first plural, else ""."""
    phrase: list[Word] = []
    place = start
    for word in each_word(caption, start, start + 2 * _NEAR):
        gap = caption[place : word.start]
        if gap.strip() or word.text in FUNCTION_WORDS or len(phrase) == 4:
            break
        phrase.append(word)
        place = word.end

    # "two dogs playing": the first plural, because what follows it is no longer the noun.
    return next((word.text for word in phrase if is_plural(word.text)), "")
