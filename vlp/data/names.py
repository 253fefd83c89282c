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
# Names on either side, in alphabetical order, that may be suggested.
_NEIGHBOURS = 40


def cleaned(name: str) -> Parts:
    """The parts of a path: composed Unicode, forward slashes, no blanks at their ends, no empty,
    `.` or `..` parts."""
    text = unicodedata.normalize("NFC", name).removeprefix("file://").replace("\\", "/")

    parts: list[str] = []
    for written in text.split("/"):
        part = written.strip()
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
            some = ", ".join([*map(repr, matches[:3]), *(["…"] if len(matches) > 3 else [])])
            return f"is ambiguous{place}: {some}; name it with its folder"

        nearest = self._nearest(name)
        hint = f"; nearest names: {', '.join(map(repr, nearest))}" if nearest else ""
        return f"is missing{place}{hint}"

    def agrees(self, name: str, stored: str) -> bool:
        """Whether one of the two is the end of the other, as far as `find` tells spellings
        apart."""
        loosest = _LEVELS[-1]
        stored_parts = _folded(cleaned(stored), loosest)
        for parts in _readings(name):
            wanted = _folded(parts, loosest)
            if _n_common(wanted, stored_parts) == min(len(wanted), len(stored_parts)):
                return True
        return False

    def _matches(self, name: str) -> list[str]:
        """The equally good readings of the strictest kind that has any."""
        for parts in _readings(name):
            matches = self._search(parts)
            if matches:
                return matches
        return []

    def _search(self, parts: Parts) -> list[str]:
        """The equally good stored names of the strictest kind, for one reading of a name."""
        if not parts or not self.names:
            return []
        # Ends of the wanted name, the longest first, that keep the folders which are there.
        starts = range(1, len(parts) - self._n_known_folders(parts[:-1]))

        # One name is the end of the other.
        for level in _LEVELS:
            wanted, index = _folded(parts, level), self._index(level)
            matches = index.whole.get(wanted) or index.ends.get(wanted)
            matches = matches or _first(index.whole, wanted, starts)
            if matches:
                return matches

        # The ends of both are the same.
        for level in _LEVELS:
            wanted, index = _folded(parts, level), self._index(level)
            matches = _first(index.ends, wanted, starts)
            if matches:
                return matches
        return []

    def _n_known_folders(self, folders: Parts) -> int:
        """How many of the last `folders` of a wanted name are a folder here: so many must agree."""
        wanted = _folded_case(folders)

        if wanted in self._folder_ends:
            return len(wanted)

        for i in range(len(wanted)):
            if wanted[i:] in self._folders:
                return len(wanted) - i
        return 0

    def _index(self, level: int) -> _Index:
        """The stored names at one level of folding, built when it is first asked for."""
        if level in self._indices:
            return self._indices[level]

        # Every end is a key: a look-up must not visit all names that share a file's name.
        index = _Index(defaultdict(list), defaultdict(list))
        for stored in self.names:
            parts = _folded(cleaned(stored) or ("",), level)
            index.whole[parts].append(stored)
            for i in range(1, len(parts)):
                index.ends[parts[i:]].append(stored)
        self._indices[level] = index
        return index

    @cached_property
    def _folders(self) -> set[Parts]:
        """The folders of the stored names, in lower case; the archive itself is none."""
        written = {name.rpartition("/")[0] for name in self.names}
        return {_folded_case(cleaned(folder)) for folder in written} - {()}

    @cached_property
    def _folder_ends(self) -> set[Parts]:
        ends: set[Parts] = set()
        for folder in self._folders:
            ends.update(folder[i:] for i in range(len(folder)))
        return ends

    @cached_property
    def _last_parts(self) -> list[tuple[str, str]]:
        """(file name in lower case, stored name), in alphabetical order."""
        return sorted((name.rpartition("/")[2].casefold(), name) for name in self.names)

    def _nearest(self, name: str) -> list[str]:
        """Up to two stored names that look like `name`, among its neighbours in the alphabet."""
        last = (cleaned(name) or ("",))[-1].casefold()
        # Comparing with a million names would take minutes.
        at = bisect.bisect_left(self._last_parts, (last, ""))
        neighbours = dict(self._last_parts[max(0, at - _NEIGHBOURS) : at + _NEIGHBOURS])
        similar = difflib.get_close_matches(last, neighbours, n=2, cutoff=0.7)
        return [neighbours[name] for name in similar]


def _first(index: dict[Parts, list[str]], wanted: Parts, starts: range) -> list[str]:
    """The stored names under the longest end of a wanted name that has any."""
    for i in starts:
        stored = index.get(wanted[i:])
        if stored:
            return stored
    return []


def _folded(parts: Parts, level: int) -> Parts:
    """The parts of a name at a level: as spelled, in lower case, then also without extension."""
    if level == 0:
        return parts

    *folders, last = _folded_case(parts)
    # Only endings of pictures are left out: `3.5_a` has none.
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
