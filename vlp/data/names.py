"""From a name in a table to a stored name, however the table spells it.

Tables are written on other machines: with other folders before the name, backslashes, another case,
another or no extension. `Names.find` goes from the strictest reading to the loosest and stops at
the first that finds something:

1. the same name, after `cleaned`;
2. one is the end of the other (`photos/a/1.jpg`, `a/1.jpg`, `1.jpg`): spelled alike, then in
   another case, then with another or no extension;
3. the end of both is the same and their folders differ (`val2017/1.jpg`, `images/1.jpg`), in the
   same three steps.

A reading with several equally good answers finds none. Neither does one that leaves the folder
which the table names where that folder is there: `train/1.jpg` is missing, not `val/1.jpg`.
"""

from __future__ import annotations

import bisect
import difflib
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple
from urllib.parse import unquote

from vlp.data.members import IMAGE_TYPES

Parts = tuple[str, ...]

# Extensions that a table may give where the stored file has another one.
_OTHER_ENDINGS = ("jpe", "jfif", "tif", "tiff", "avif", "heic", "ppm", "pgm", "pbm", "pnm", "jp2")
_PICTURE_ENDINGS = IMAGE_TYPES.union(_OTHER_ENDINGS)
_LEVELS = range(3)  # as spelled, in any case, without extension
_NEIGHBOURS = 40  # names on either side, in alphabetical order, that may be suggested


def cleaned(name: str) -> Parts:
    """The parts of a path: composed Unicode, forward slashes, no blanks at their ends, no empty,
    `.` or `..` parts."""
    text = unicodedata.normalize("NFC", name).removeprefix("file://").replace("\\", "/")
    parts: list[str] = []
    for part in (part.strip() for part in text.split("/")):
        if part == ".." and parts:
            parts.pop()
        elif part not in ("", ".", ".."):
            parts.append(part)
    return tuple(parts)


def _readings(name: str) -> Iterator[Parts]:
    """The parts of a name as written; then of an address without its query and escapes."""
    yield cleaned(name)
    if "?" in name or "%" in name:
        yield cleaned(unquote(name.partition("?")[0]))


class _Index(NamedTuple):
    """Stored names by the parts of their path, folded: by all of them, and by every shorter end."""

    whole: dict[Parts, list[str]]
    ends: dict[Parts, list[str]]


class Names:
    """The stored names of an archive, to be found by other spellings. Indices are built when a name
    first needs them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names  # sorted
        self._stored = set(names)
        self._indices: dict[int, _Index] = {}

    def find(self, name: str) -> str | None:
        """The one stored name that `name` means, or None."""
        if name in self._stored:
            return name
        matches = self._matches(name)
        return matches[0] if len(matches) == 1 else None

    def why_not(self, name: str, place: str = "") -> str:
        """Why `find` answers None, to stand behind the name: "is missing{place} …" or "is
        ambiguous{place} …"."""
        matches = self._matches(name)
        if matches:
            some = ", ".join(repr(match) for match in matches[:3])
            return f"is ambiguous{place}: {some}{', …' if len(matches) > 3 else ''}; name it with its folder"
        nearest = self._nearest(name)
        hint = f"; nearest names: {', '.join(map(repr, nearest))}" if nearest else ""
        return f"is missing{place}{hint}"

    def agrees(self, name: str, stored: str) -> bool:
        """Whether one of the two is the end of the other, as far as `find` tells spellings
        apart."""
        loosest = _LEVELS[-1]
        there = _folded(cleaned(stored), loosest)
        readings = [_folded(parts, loosest) for parts in _readings(name)]
        return any(_n_common(wanted, there) == min(len(wanted), len(there)) for wanted in readings)

    def _matches(self, name: str) -> list[str]:
        """The equally good readings of the strictest kind that has any."""
        for parts in _readings(name):
            if found := self._search(parts):
                return found
        return []

    def _search(self, parts: Parts) -> list[str]:
        if not parts or not self.names:
            return []
        # Ends of the wanted name, the longest first, that keep the folders which are there.
        starts = range(1, len(parts) - self._n_known_folders(parts[:-1]))
        for level in _LEVELS:
            wanted, index = _folded(parts, level), self._index(level)
            found = index.whole.get(wanted) or index.ends.get(wanted)
            shorter = (index.whole.get(wanted[i:]) for i in starts)
            if found := found or next(filter(None, shorter), None):
                return found
        for level in _LEVELS:
            wanted, index = _folded(parts, level), self._index(level)
            if found := next(filter(None, (index.ends.get(wanted[i:]) for i in starts)), None):
                return found
        return []

    def _n_known_folders(self, folders: Parts) -> int:
        """How many of the last `folders` of a wanted name are a folder here: so many must agree."""
        wanted = _folded_case(folders)
        if wanted in self._folder_ends:
            return len(wanted)
        return next((len(wanted) - i for i in range(len(wanted)) if wanted[i:] in self._folders), 0)

    def _index(self, level: int) -> _Index:
        if level not in self._indices:
            index = _Index(defaultdict(list), defaultdict(list))
            for stored in self.names:
                parts = _folded(cleaned(stored) or ("",), level)
                index.whole[parts].append(stored)
                for i in range(1, len(parts)):
                    index.ends[parts[i:]].append(stored)
            self._indices[level] = index
        return self._indices[level]

    @cached_property
    def _folders(self) -> set[Parts]:
        return {
            _folded_case(cleaned(folder))
            for folder in {name.rpartition("/")[0] for name in self.names}
        } - {()}

    @cached_property
    def _folder_ends(self) -> set[Parts]:
        return {folder[i:] for folder in self._folders for i in range(len(folder))}

    @cached_property
    def _lasts(self) -> list[tuple[str, str]]:
        return sorted((name.rpartition("/")[2].casefold(), name) for name in self.names)

    def _nearest(self, name: str) -> list[str]:
        """Up to two stored names that look like `name`, among its neighbours in the alphabet."""
        last = (cleaned(name) or ("",))[-1].casefold()
        at = bisect.bisect_left(self._lasts, (last, ""))
        neighbours = dict(self._lasts[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS])
        return [
            neighbours[near]
            for near in difflib.get_close_matches(last, neighbours, n=2, cutoff=0.7)
        ]


def _folded(parts: Parts, level: int) -> Parts:
    if level == 0:
        return parts
    *folders, last = _folded_case(parts)
    stem, dot, ending = last.rpartition(".")
    if level == 2 and dot and ending in _PICTURE_ENDINGS:
        last = stem
    return (*folders, last)


def _folded_case(parts: Parts) -> Parts:
    return tuple(part.casefold() for part in parts)


def _n_common(one: Parts, other: Parts) -> int:
    """How many parts at the end are the same."""
    n = 0
    for a, b in zip(reversed(one), reversed(other)):
        if a != b:
            break
        n += 1
    return n
