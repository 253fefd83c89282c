"""Where the sentences of a caption end.

A sentence ends with a full stop, an exclamation or question mark or an ellipsis, the closing quotes
and brackets behind it included, before white space; with the marks of Chinese and Japanese; and
with a line. A full stop is no end before a small letter, nor behind an initial ("J. Smith") or one
of `ABBREVIATIONS`.

Long-CLIP cuts its short text at the first ". ", abbreviations included (arXiv 2403.15378).
"""

from __future__ import annotations

import re

ABBREVIATIONS = frozenset("mr mrs ms dr prof st sr jr vs fig e.g i.e u.s u.k".split())

_END = re.compile(r"(?P<marks>[.!?…]+)[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*|\n+")
_LAST_WORD = re.compile(r"[\w.]*$")


def sentences(caption: str) -> list[str]:
    """The sentences of a caption, in order and without the white space around them; the caption
    itself where it is one.
    """
    parts = []
    start = 0
    for match in _END.finditer(caption):
        if _is_end(caption, match):
            parts.append(caption[start : match.end()])
            start = match.end()
    parts.append(caption[start:])

    stripped = (part.strip() for part in parts)
    return [part for part in stripped if part] or [caption]


def first_sentence(caption: str) -> str:
    """The first of `sentences`."""
    return sentences(caption)[0]


def _is_end(caption: str, match: re.Match[str]) -> bool:
    """Whether a mark that may end a sentence does."""
    if match["marks"] != ".":
        return True

    following = caption[match.end() :].lstrip()[:1]
    if following.islower():
        return False
    last_word = _LAST_WORD.search(caption, 0, match.start())
    assert last_word is not None  # it may be empty
    word = last_word[0]
    is_initial = len(word) == 1 and word.isupper()
    return not is_initial and word.lower() not in ABBREVIATIONS
