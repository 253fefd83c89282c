"""Where the files of an unpacked data set lie: a folder, here or in a store, or a tar that is read
without unpacking.

One walk for `vlp data pack`, the sources and evaluation. Hidden and system names are never looked
into. Links are followed, and every folder is read once, under its own name before that of a link,
so that loops end. What is neither a picture nor a text is counted by reason in `Archive.left_out`.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from vlp.data import stored, stored_files
from vlp.data.captions import MAX_TEXT_BYTES
from vlp.data.members import IMAGE_TYPES, MAX_IMAGE_BYTES, TEXT_TYPES, is_hidden, split_name
from vlp.data.names import Names, cleaned
from vlp.data.stored import StoredPath
from vlp.data.stored_files import files_below, hidden_part, top_folder_of
from vlp.data.tables import fetched, pictured
from vlp.data.tar import DamagedTar, Member, foreign, packed_with, walk

_SHOWN = 3  # names that are given for a reason
_LONGEST_EXTENSION = 10  # what is longer is the end of a sentence


class Place(NamedTuple):
    """Bytes in a file; size −1 is the whole file.

    `column`: of a parquet file, whose row `offset`, counted from 0, holds the bytes.
    """

    path: str
    offset: int = 0
    size: int = -1
    column: str = ""

    def read(self) -> bytes:
        """The bytes of an image; raises OSError, or ValueError where they are no longer there or
        too many."""
        # Not asked of a store, which would be sent all of it.
        if self.size == 0 or self.size > MAX_IMAGE_BYTES:
            raise ValueError(f"{self.path}: found {self.size} bytes of an image")
        data = self._bytes(MAX_IMAGE_BYTES)
        is_whole = self.size in (-1, len(data))
        if not is_whole or not 0 < len(data) <= MAX_IMAGE_BYTES:
            raise ValueError(f"{self.path}: found {len(data)} bytes of an image")
        return data

    def read_text(self) -> bytes:
        """The bytes of a text, at most one more than a text may have; raises OSError."""
        return self._bytes(MAX_TEXT_BYTES)

    def _bytes(self, most: int) -> bytes:
        if self.column:
            return pictured.read(self.path, self.column, self.offset)
        # One byte too many tells the caller that there are more.
        size = most + 1 if self.size < 0 else self.size
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(size)


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

    def remove(self, reason: str, name: str) -> None:
        """Count one name no longer."""
        self.counts[reason] -= 1
        if not self.counts[reason]:
            del self.counts[reason]
        if name in self.names[reason]:
            self.names[reason].remove(name)

    def __str__(self) -> str:
        """Such as "12 .webm (a.webm, b.webm, c.webm, …), 1 hidden (.ipynb_checkpoints/)"; empty for
        nothing."""
        parts = []
        for reason, count in self.counts.most_common():
            some = f" ({self._some(reason)})" if self.names[reason] else ""
            parts.append(f"{count:,} {reason}{some}")
        return ", ".join(parts)

    def _some(self, reason: str) -> str:
        names = ", ".join(self.names[reason])
        has_more = self.counts[reason] > len(self.names[reason])
        return f"{names}, …" if has_more else names


class Archive:
    """The pictures in a folder and below, or in a tar, by name: the path within, with forward
    slashes.

    `below`: only what lies in this sub-folder, whose name is then no part of the names. `leave`:
    whether links that lead out of the folder are followed. `copies`: where texts of a folder in a
    store are brought; pictures stay there, and their places are addresses. `in_rows`: whether
    pictures in the rows of img2dataset's parquet files count, for who reads them in their order.
    Raises ValueError, and OSError where a store fails.
    """

    def __init__(
        self,
        path: str | Path,
        below: str = "",
        leave: bool = True,
        copies: Path | None = None,
        in_rows: bool = False,
    ) -> None:
        self.path = stored.source(str(path))
        self.below = below
        self.left_out = LeftOut()
        # Links that lead out of the folder: name -> target.
        self.outside: dict[str, str] = {}
        self.texts: dict[str, Place] = {}  # those that may belong to a picture
        # Of the first level, files by extension.
        self.folders: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._places: dict[str, Place] = {}
        self.versions: dict[str, str] = {}  # of files in a store, by name

        if isinstance(self.path, StoredPath):
            if copies is None:
                raise ValueError(
                    f"{self.path} lies in a store; name a folder or tar of this machine, or make "
                    f"shards of it: vlp data pack {self.path} --to DIR"
                )
            self._take_stored("/".join(cleaned(below)), copies)
        elif self.path.is_dir():
            self._check_below(below, self.path / below)
            self.path = self.path / below
            self._take_folder(leave)
            # Beside pictures in files, as it mostly is, a table says more of them and holds none.
            if in_rows and not self._places:
                self._take_rows()
        elif self.path.is_file():
            self._take_tar("/".join(cleaned(below)))
        else:
            raise ValueError(f"{self.path} is neither a folder nor a tar file")

        # Sorted, because neither a file system nor a tar has an order that means anything.
        self.names = sorted(self._places)
        self.index = Names(self.names)

    def find(self, name: str) -> str | None:
        """The stored name of the picture that a table names, or None. Nothing outside the archive
        is ever found.

        `vlp.data.names` says which spellings agree.
        """
        return self.index.find(name)

    @property
    def has_texts(self) -> bool:
        """Whether there are texts that may belong to pictures, beside the statistics of shards."""
        return any(not name.endswith("_stats.json") for name in self.texts)

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
        """Raise ValueError where there is no such sub-folder, with those that there are."""
        if folder.is_dir():
            return
        folders = [
            entry.name
            for entry in os.scandir(self.path)
            if entry.is_dir() and not is_hidden(entry.name)
        ]

        raise ValueError(_no_folder(self.path, below, folders))

    def _take(self, name: str, place: Place) -> None:
        """Keep a file by its kind, or count it as left out."""
        extension = extension_of(name)
        if "/" in name:
            top_folder = name.split("/")[0]
            self.folders[top_folder][extension] += 1

        if extension in IMAGE_TYPES:
            self._places[name] = place
        elif extension in TEXT_TYPES:
            self.texts[name] = place
        elif 0 < len(extension) <= _LONGEST_EXTENSION:
            self.left_out.add(f".{extension}", name)
        else:
            self.left_out.add("of no known kind", name)

    def _take_tar(self, below: str) -> None:
        """Take the members of the tar that lie in the folder `below`."""
        prefix = f"{below}/" if below else ""
        top_folders = set()
        with open(self.path, "rb", buffering=1 << 18) as file:
            self._refuse_packed(file.read(8))
            for member in self._members(file):
                # As the members of shards are read: `vlp.data.members.parse_name`.
                folders, last = split_name(member.name)
                parts = [*folders, last]
                name = "/".join(parts)
                if folders:
                    top_folders.add(folders[0])

                if not name.startswith(prefix):
                    continue
                if any(is_hidden(part) for part in parts):
                    self.left_out.add("hidden", name)
                    continue
                name = name.removeprefix(prefix)
                if name in self._places or name in self.texts:
                    self.left_out.add("further members of the same name", name)
                    continue
                self._take(name, Place(str(self.path), member.offset, member.size))

        if below and not (self._places or self.texts):
            raise ValueError(_no_folder(self.path, below, top_folders))

    def _members(self, file: BinaryIO) -> Iterator[Member]:
        """The members of the tar; raises ValueError for damage, since a part would be lost. What is
        no regular file is counted.
        """
        passed: Counter[str] = Counter()
        try:
            yield from walk(file, 0, self.path.stat().st_size, passed)
        except DamagedTar as error:
            raise ValueError(
                f"{self.path} is no tar, or damaged: {error}; fetch or pack it again"
            ) from None
        for kind in passed.keys() - {"folders", "joints"}:
            self.left_out.counts[kind] += passed[kind]

    def _refuse_packed(self, start: bytes) -> None:
        # Samples are read from any place, and a compressed tar has none to go to.
        if kind := packed_with(start):
            raise ValueError(
                f"{self.path} is compressed with {kind}; unpack it first, or, if it holds shards, "
                f"write plain ones: vlp data reshard {self.path} --to DIR"
            )

        if kind := foreign(start):
            raise ValueError(f"{self.path} is no tar: it is {kind}")

    def _take_folder(self, leave: bool) -> None:
        for name, path in sorted(self._files(leave)):
            self._take(name, Place(path))

    def _take_rows(self) -> None:
        """Take the pictures in the rows of img2dataset's parquet files at the top."""
        for path in fetched.files_in(self.path):
            column, rows = fetched.pictures_in(path)
            for name, row in rows.items():
                self._take(name, Place(str(path), row, column=column))
            if column:
                self.left_out.remove(".parquet", path.name)

    def _take_stored(self, below: str, copies: Path) -> None:
        """Take the files of a folder in a store, and bring its texts."""
        assert isinstance(self.path, StoredPath)
        whole, self.path = self.path, self.path / below
        prefix = f"{below}/" if below else ""
        hidden: set[str] = set()
        top_folders = set()
        for file in files_below(whole):
            top_folders |= top_folder_of(file.name)
            if not file.name.startswith(prefix):
                continue
            name = file.name.removeprefix(prefix)
            for top_folder in top_folder_of(name):
                # Also one that holds nothing to read.
                self.folders.setdefault(top_folder, Counter())

            # A hidden folder is one thing that is left out, as on a disk.
            if shown := hidden_part(name):
                if shown not in hidden:
                    self.left_out.add("hidden", shown)
                hidden.add(shown)
                continue
            self.versions[name] = file.version
            self._take(name, Place(file.address, 0, file.size))

        if below and not (self._places or self.texts):
            raise ValueError(_no_folder(whole, below, top_folders))
        there = [(place.path, place.size) for place in self.texts.values()]
        here = stored_files.copies(there, copies, MAX_TEXT_BYTES + 1)
        self.texts = {name: Place(str(path)) for name, path in zip(self.texts, here)}

    def _files(self, leave: bool) -> Iterator[tuple[str, str]]:
        """(name, path) of every regular file below the folder that is not hidden."""
        home = os.path.realpath(self.path)
        visited = {_identity(home)}
        folders = [("", str(self.path))]  # prefix of the names in it, path
        linked_folders: deque[tuple[str, str]] = deque()
        while folders or linked_folders:
            # Links wait until all real folders are read, so that a folder keeps its own name.
            if folders:
                prefix, path = folders.pop()
            else:
                prefix, path = linked_folders.popleft()
                if _identity(path) in visited:
                    self.left_out.add("links to folders that are read already", prefix)
                    continue
                visited.add(_identity(path))

            for entry in self._entries(path, prefix):
                name = prefix + entry.name
                if entry.is_symlink() and not self._may_follow(name, entry.path, home, leave):
                    continue

                if entry.is_file():
                    yield name, entry.path
                    continue
                if not entry.is_dir():  # opening a pipe would wait for ever
                    self.left_out.add("no regular file", name)
                    continue

                if not prefix:
                    # Also one that holds nothing.
                    self.folders.setdefault(entry.name, Counter())
                if entry.is_symlink():
                    linked_folders.append((f"{name}/", entry.path))
                else:
                    visited.add(_identity(entry.path))
                    folders.append((f"{name}/", entry.path))

    def _entries(self, path: str, prefix: str) -> list[os.DirEntry]:
        """The entries of a folder that are not hidden, by name."""
        try:
            # Sorted: of two links to one folder the first by name is read, on every machine.
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            self.left_out.add("folders that cannot be read", prefix or str(self.path))
            return []

        visible = []
        for entry in entries:
            if not is_hidden(entry.name):
                visible.append(entry)
                continue
            mark = "/" if entry.is_dir(follow_symlinks=False) else ""
            self.left_out.add("hidden", prefix + entry.name + mark)
        return visible

    def _may_follow(self, name: str, path: str, home: str, leave: bool) -> bool:
        """Whether a link is read like what it leads to; else it is counted."""
        if not os.path.exists(path):
            self.left_out.add("broken links", name)
            return False

        target = os.path.realpath(path)
        shared = os.path.commonpath([target, home])
        leads_above = shared == target and target != home
        if leads_above:
            # Followed, it would bring in the folder's neighbours, and this folder once more.
            self.left_out.add("links to a folder that holds this one", name)
            return False

        leads_out = shared != home
        if leads_out and not leave:
            self.left_out.add("links that lead out of the folder", name)
            return False
        if leads_out:
            self.outside[name] = target
        return True


def _no_folder(path: Path, below: str, folders: Iterable[str]) -> str:
    """What to say of a sub-folder that is not there."""
    there = ", ".join(sorted(folders)) or "none"
    return f"{path} holds no folder {below!r}; there are: {there}"


def _identity(path: str) -> tuple[int, int]:
    """What tells a folder under all its names."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
