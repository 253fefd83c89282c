"""Where the files of an unpacked data set lie: a folder, or a tar that is read without unpacking.

One walk for `vlp data pack`, the sources and evaluation. Hidden and system names are never looked
into. Links are followed, and every folder is read once, under its own name before that of a link,
so that loops end. What is neither a picture nor a text is counted by reason in `Archive.left_out`.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlp.data.captions import MAX_TEXT_BYTES
from vlp.data.members import IMAGE_TYPES, MAX_IMAGE_BYTES, TEXT_TYPES, is_hidden
from vlp.data.names import Names, cleaned
from vlp.data.tar import DamagedTar, Member, foreign, packed_with, walk

CAPTION_TYPES = TEXT_TYPES | {"caption"}  # of texts that may lie beside a picture under its name
_SHOWN = 3  # names that are given for a reason


class Place(NamedTuple):
    """Bytes in a file; size −1 is the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes of an image; raises OSError, or ValueError where they are no longer there or
        too many."""
        data = self._bytes(MAX_IMAGE_BYTES)
        if not 0 < len(data) <= MAX_IMAGE_BYTES or self.size not in (-1, len(data)):
            raise ValueError(f"{self.path}: found {len(data)} bytes of an image")
        return data

    def read_text(self) -> bytes:
        """The bytes of a text, at most one more than a text may have; raises OSError."""
        return self._bytes(MAX_TEXT_BYTES)

    def _bytes(self, most: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(most + 1 if self.size < 0 else self.size)


def image_type(name: str) -> str:
    """The extension of a file name, lower case, or "" where it is no image type that shards
    hold."""
    extension = extension_of(name)
    return extension if extension in IMAGE_TYPES else ""


def extension_of(name: str) -> str:
    """The extension of a file name, lower case and without its dot or blanks."""
    return os.path.splitext(name.rstrip())[1].lower().lstrip(".")


def printable(name: str) -> str:
    """A file name as text that can be stored and printed: composed Unicode, wrong bytes as
    escapes."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode("utf-8"))


class LeftOut:
    """What was passed over, counted by reason, with the first names of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str) -> None:
        """Count one name."""
        self.counts[reason] += 1
        if len(self.names[reason]) < _SHOWN:
            self.names[reason].append(printable(name))

    def __str__(self) -> str:
        """Such as "12 .webm (a.webm, b.webm, c.webm, …), 1 hidden (.ipynb_checkpoints/)"; empty for
        nothing."""
        return ", ".join(
            f"{count:,} {reason} ({self._some(reason)})"
            for reason, count in self.counts.most_common()
        )

    def _some(self, reason: str) -> str:
        more = ["…"] if self.counts[reason] > len(self.names[reason]) else []
        return ", ".join(self.names[reason] + more)


class Archive:
    """The pictures in a folder and below, or in a tar, by name: the path within, with forward
    slashes.

    `below`: only what lies in this sub-folder, whose name is then no part of the names. `leave`:
    whether links that lead out of the folder are followed. Raises ValueError.
    """

    def __init__(self, path: str | Path, below: str = "", leave: bool = True) -> None:
        self.path, self.below = Path(path).expanduser(), below
        self.left_out = LeftOut()
        self.outside: dict[str, str] = {}  # links that lead out of the folder: name -> target
        self.texts: dict[str, Place] = {}  # those that may belong to a picture
        self.folders: defaultdict[str, Counter[str]] = defaultdict(
            Counter
        )  # the first level: files by extension
        self._places: dict[str, Place] = {}
        if self.path.is_dir():
            self._check_below(below, self.path / below)
            self.path = self.path / below
            self._take_folder(leave)
        elif self.path.is_file():
            self._take_tar("/".join(cleaned(below)))
        else:
            raise ValueError(f"{self.path} is neither a folder nor a tar file")
        self.names = sorted(self._places)
        self.index = Names(self.names)

    def find(self, name: str) -> str | None:
        """The stored name of the picture that a table names, or None. Nothing outside the archive
        is ever found.

        `vlp.data.names` says which spellings agree.
        """
        return self.index.find(name)

    def why_not(self, name: str) -> str:
        """Why `find` answers None, to stand behind the name: "is missing in …", with the nearest
        names there are."""
        return self.index.why_not(name, f" in {self.path}")

    def agrees(self, name: str, stored: str) -> bool:
        """Whether a name and the stored name that `find` gave contradict each other in no
        folder."""
        return self.index.agrees(name, stored)

    def place(self, name: str) -> Place:
        """Where an image of `names` lies."""
        return self._places[name]

    def read(self, name: str) -> bytes:
        """The bytes of an image of `names`."""
        return self._places[name].read()

    def _check_below(self, below: str, folder: Path) -> None:
        if not folder.is_dir():
            there = sorted(
                entry.name
                for entry in os.scandir(self.path)
                if entry.is_dir() and not is_hidden(entry.name)
            )
            raise ValueError(
                f"{self.path} holds no folder {below!r}; there are: {', '.join(there) or 'none'}"
            )

    def _take(self, name: str, place: Place) -> None:
        extension = extension_of(name)
        if "/" in name:
            self.folders[name.split("/")[0]][extension] += 1
        if extension in IMAGE_TYPES:
            self._places[name] = place
        elif extension in CAPTION_TYPES:
            self.texts[name] = place
        else:
            self.left_out.add(
                f".{extension}" if 0 < len(extension) <= 10 else "of no known kind", name
            )

    def _take_tar(self, below: str) -> None:
        prefix = f"{below}/" if below else ""
        seen = set()
        with open(self.path, "rb", buffering=1 << 18) as file:
            self._refuse_packed(file.read(8))
            for member in self._members(file):
                parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
                name = "/".join(parts)
                seen.add(parts[0] if len(parts) > 1 else "")
                if not name.startswith(prefix):
                    continue
                if any(is_hidden(part) for part in parts):
                    self.left_out.add("hidden", name)
                else:
                    self._take(
                        name.removeprefix(prefix), Place(str(self.path), member.offset, member.size)
                    )
        if below and not (self._places or self.texts):
            raise ValueError(
                f"{self.path} holds no folder {below!r}; there are: "
                f"{', '.join(sorted(seen - {''})) or 'none'}"
            )

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        try:
            yield from walk(file, 0, self.path.stat().st_size)
        except DamagedTar as error:
            raise ValueError(
                f"{self.path} is no tar, or damaged: {error}; fetch or pack it again"
            ) from None

    def _refuse_packed(self, start: bytes) -> None:
        if kind := packed_with(start):
            raise ValueError(
                f"{self.path} is compressed with {kind}; unpack it first, or, if it holds shards, write plain ones: "
                f"vlp data reshard {self.path} --to DIR"
            )
        if kind := foreign(start):
            raise ValueError(f"{self.path} is no tar: it is {kind}")

    def _take_folder(self, leave: bool) -> None:
        for name, path in sorted(self._files(leave)):
            self._take(name, Place(path))

    def _files(self, leave: bool) -> Iterator[tuple[str, str]]:
        """(name, path) of every regular file below the folder that is not hidden."""
        home = os.path.realpath(self.path)
        visited = {_identity(home)}
        folders, linked = [("", str(self.path))], deque()
        while folders or linked:
            # Links wait until all real folders are read, so that a folder keeps its own name.
            if folders:
                prefix, path = folders.pop()
            else:
                prefix, path = linked.popleft()
                if _identity(path) in visited:
                    self.left_out.add("links to folders that are read already", prefix)
                    continue
                visited.add(_identity(path))
            for entry in self._entries(path, prefix):
                name = prefix + entry.name
                if entry.is_symlink() and not self._may_follow(name, entry.path, home, leave):
                    continue
                if entry.is_dir():
                    if not prefix:
                        self.folders[entry.name]  # also one that turns out to hold nothing
                    if entry.is_symlink():
                        linked.append((f"{name}/", entry.path))
                    else:
                        visited.add(_identity(entry.path))
                        folders.append((f"{name}/", entry.path))
                elif entry.is_file():
                    yield name, entry.path
                else:
                    self.left_out.add("no regular file", name)

    def _entries(self, path: str, prefix: str) -> list[os.DirEntry]:
        """The entries of a folder that are not hidden, by name."""
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            self.left_out.add("folders that cannot be read", prefix or str(self.path))
            return []
        for entry in entries:
            if is_hidden(entry.name):
                self.left_out.add(
                    "hidden", prefix + entry.name + "/" * entry.is_dir(follow_symlinks=False)
                )
        return [entry for entry in entries if not is_hidden(entry.name)]

    def _may_follow(self, name: str, path: str, home: str, leave: bool) -> bool:
        if not os.path.exists(path):
            self.left_out.add("broken links", name)
            return False
        target = os.path.realpath(path)
        shared = os.path.commonpath([target, home])
        if shared == target != home:
            self.left_out.add("links to a folder that holds this one", name)
            return False
        if shared != home:
            if not leave:
                self.left_out.add("links that lead out of the folder", name)
                return False
            self.outside[name] = target
        return True


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
