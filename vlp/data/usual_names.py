"""What captions are called by the field, as a column of a table or a field of a sample's JSON."""

from __future__ import annotations

import re
from collections.abc import Collection

# Looked for in this order where none is named, in any case and with blanks, "-", "_" or nothing.
CAPTION_NAMES = (
    "captions", "caption", "text", "texts", "title", "sentences", "sentence", "raw", "comments",
    "comment", "txt", "description", "alt_text", "alt", "caption_str",
)  # fmt: skip
# In the JSON of one picture a title may be no more than the name of its file.
_IN_JSON = (*(name for name in CAPTION_NAMES if name != "title"), "title")


def plain(name: str) -> str:
    """A name without case, blanks and marks."""
    return re.sub(r"[\W_]+", "", name.casefold())


def stand_in(fields: Collection[str]) -> str | None:
    """Which of the fields that hold texts has the captions of a sample, where none of those has
    that are asked first; None for a sample with a class, which may have a title as well.
    """
    if "class" in fields:
        return None

    # Reversed, so that the first of two fields of one plain name counts.
    by_plain_name = {plain(name): name for name in reversed([*fields])}
    usual = (by_plain_name.get(plain(name)) for name in _IN_JSON)
    return next(filter(None, usual), None)
