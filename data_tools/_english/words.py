"""Small English: words and their places, articles, plurals, capitals. Pure functions."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

IRREGULAR = {
    "man": "men", "woman": "women", "gentleman": "gentlemen", "child": "children",
    "person": "people", "foot": "feet", "goose": "geese", "mouse": "mice", "tooth": "teeth",
    "knife": "knives", "wolf": "wolves", "leaf": "leaves", "loaf": "loaves", "shelf": "shelves",
    "bookshelf": "bookshelves", "scarf": "scarves", "calf": "calves", "half": "halves",
    "sheep": "sheep", "deer": "deer", "fish": "fish", "broccoli": "broccoli",
    "aircraft": "aircraft", "tomato": "tomatoes", "potato": "potatoes", "bus": "buses",
}  # fmt: skip
_PLURALS = frozenset(IRREGULAR.values()) - {"broccoli"}
_SINGULAR_S = frozenset(["gas", "lens", "has", "was", "as", "always", "perhaps", "towards"])
_SOUNDS_LIKE_YOU = ("uni", "use", "usu", "uti", "eu", "ubi", "one", "once", "ut")
_SOUNDS_LIKE_UN = ("unin", "unid", "unim")
_SILENT_H = ("hour", "honest", "heir", "honor")


_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")


class Word(NamedTuple):
    """A word of a caption, in lower case, and where it stands."""

    text: str
    start: int
    end: int


def words(caption: str) -> list[Word]:
    """Words and whole numbers in order; hyphens and apostrophes inside a word belong to it."""
    return list(each_word(caption))


def each_word(caption: str, start: int = 0, end: int = sys.maxsize) -> Iterator[Word]:
    """The words between two places of a caption, found one by one."""
    for match in _WORD.finditer(caption, start, end):
        yield Word(match[0].lower(), match.start(), match.end())


def plural(noun: str) -> str:
    """The plural of a noun in the singular: "box" → "boxes", "woman" → "women"."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"


def is_plural(word: str) -> bool:
    """Whether a word looks like a noun in the plural."""
    if word in _PLURALS:
        return True
    if word in _SINGULAR_S or word.endswith(("ss", "us", "is", "'s", "’s")):
        return False
    return word.endswith("s")


def article(following: str) -> str:
    """ "a" or "an", by the sound that `following` starts with."""
    word = following.lower()
    if word[:1].isdigit():
        return "an" if word[0] == "8" or word in ("11", "18") else "a"

    # By sound, not by letter: an hour, a unicorn, but an uninvited guest.
    if word.startswith(_SILENT_H):
        return "an"
    if word.startswith(_SOUNDS_LIKE_YOU) and not word.startswith(_SOUNDS_LIKE_UN):
        return "a"
    return "an" if word.startswith(tuple("aeiou")) else "a"


_ARTICLE = re.compile(r"\b(an?)(\s+)$", re.IGNORECASE)
_BLANKS = 16  # most characters of an article and what follows it


def edit(caption: str, changes: list[tuple[int, int, str]]) -> str:
    """Replace the spans (start, end, new words), keep each place's capitals, and correct the
    articles before them.

    Takes time in proportion to the caption's length.
    """
    pieces: list[str] = []
    done = 0
    for start, end, new in sorted(changes):
        # Only the few characters before are searched, else a long caption takes minutes.
        match = _ARTICLE.search(caption, max(done, start - _BLANKS), start)
        if match:
            blanks = match[2]
            pieces += [caption[done : match.start()], _capitals_of(match[1], article(new)), blanks]
        else:
            pieces.append(caption[done:start])
        pieces.append(_capitals_of(caption[start:end], new))
        done = end
    return "".join([*pieces, caption[done:]])


def _capitals_of(old: str, new: str) -> str:
    """The new word in capitals as the old one has them: all, the first, or none."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    if old[:1].isupper():
        return new[:1].upper() + new[1:]
    return new


def bare(caption: str) -> str:
    """The words alone: captions that differ in capitals and punctuation only are the same."""
    return " ".join(re.findall(r"[\w’'-]+", caption.lower()))
