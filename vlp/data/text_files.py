"""The text files of a sample: which of them is its text."""

from __future__ import annotations

import re

# Their extensions. Of a sample's files the first of these that holds any text is its text file,
# which is called `txt` in a choice of captions.
TEXT_FILES = ("txt", "text", "caption")
# The labels of a detector: the number of a class and at least two points, in parts of the picture.
_BOX = r"\d{1,5}(?:[ \t]+(?:[01]?\.\d+(?:[eE]-\d+)?|[01])){4,}[ \t]*"
_BOXES = re.compile(rf"{_BOX}(?:\n+{_BOX})*")


def chosen(texts: dict[str, str]) -> tuple[str, list[str]]:
    """The first of a sample's text files, by extension, that holds a text; and which others are
    not read, in words.
    """
    texts = {kind: _plain(text) for kind, text in texts.items()}
    spare = [f"a .{kind} of boxes" for kind, text in texts.items() if _BOXES.fullmatch(text)]
    filled = [(kind, text) for kind, text in texts.items() if text and not _BOXES.fullmatch(text)]
    if not filled:
        return "", spare
    first_kind, first = filled[0]
    spare += [f"a .{kind} beside a .{first_kind}" for kind, text in filled if text != first]
    return first, spare


def _plain(text: str) -> str:
    """A text without blanks around it, its lines ended as on Unix."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.strip()
