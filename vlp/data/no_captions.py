"""Text files that lie beside pictures and are no captions: what detectors, readers of text and
players of videos take.

    0 0.5 0.5 0.25 0.125                        a class and a box or polygon, as YOLO has them
    dog 0.5 0.5 0.25 0.125                      the same with a name, or KITTI's fifteen columns
    7 120 45 200 300                            in pixels
    377,117,463,117,465,130,378,130,Theatre     four corners and a text (ICDAR, DOTA)
    38, 43, 920, 215, "Tiredness"               a box and a text
    00:01:02,000 --> 00:01:04,000               subtitles

Every line must be of such a form, and some number have a fraction or three digits: "1 2 3 4 5" may
be a caption.
"""

from __future__ import annotations

import re
from itertools import takewhile

_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
_SEPARATORS = re.compile(r"[\s,;]+")
_FRACTION = re.compile(r"\.\d")
_SIZE_OF_PIXELS = re.compile(r"\.\d|\d{3}")
_HEADER = re.compile(r"(?:imagesource|gsd):.*")  # of DOTA's files
_TIMES = re.compile(r"^(?:\d+:)?\d\d:\d\d[.,]\d{3} --> ", re.MULTILINE)

_SHORTEST_BOX = 4  # numbers
_CORNERS = 8  # numbers of four corners


def content_of(text: str) -> str:
    """What a text file holds that is no caption, "boxes" or "subtitles"; "" for any other text.
    `text`: without blanks around it.
    """
    if " --> " in text and _TIMES.search(text):
        return "subtitles"
    if _is_of_boxes(text):
        return "boxes"
    return ""


def _is_of_boxes(text: str) -> bool:
    # Nearly every caption is told by its first line.
    is_any = False
    for line in text.split("\n"):
        if not line.strip() or _HEADER.fullmatch(line):
            continue
        if not _is_box(line):
            return False
        is_any = True
    return is_any and bool(_SIZE_OF_PIXELS.search(text))


def _is_box(line: str) -> bool:
    """Whether a line is one object of an annotation."""
    fields = _SEPARATORS.split(line.strip())
    n_numbers = _n_leading_numbers(fields)
    if n_numbers == len(fields):
        return n_numbers > _SHORTEST_BOX

    # A text stands behind the corners of what it was read from.
    if n_numbers >= _CORNERS or (n_numbers >= _SHORTEST_BOX and line.count(",") >= _SHORTEST_BOX):
        return True

    # "Sofa 200 90 80 75" may be a caption.
    n_behind_name = _n_leading_numbers(fields[1:])
    is_whole = n_behind_name == len(fields) - 1
    return is_whole and n_behind_name >= _SHORTEST_BOX and bool(_FRACTION.search(line))


def _n_leading_numbers(fields: list[str]) -> int:
    return len(list(takewhile(_NUMBER.fullmatch, fields)))
