"""Where the image files of an unpacked data set lie: a folder, or a tar that is read without unpacking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from vlp.data.members import IMAGE_TYPES, MAX_IMAGE_BYTES, walk


class Place(NamedTuple):
    """Bytes in a file; size −1 is the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes; raises OSError, or ValueError where they are no longer there or too many."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(MAX_IMAGE_BYTES + 1 if self.size < 0 else self.size)
        if not 0 < len(data) <= MAX_IMAGE_BYTES or self.size not in (-1, len(data)):
            raise ValueError(f"{self.path}: found {len(data)} bytes of an image")
        return data


def image_type(name: str) -> str:
    """The extension of a file name, lower case, or "" where it is no image type that shards hold."""
    extension = os.path.splitext(name)[1].lower().lstrip(".")
    return extension if extension in IMAGE_TYPES else ""


class Archive:
    """The images in a folder and below, or in a tar, by name: the path within, with forward slashes. Raises ValueError."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.is_dir():
            self._places = self._walk_folder()
        elif self.path.is_file():
            self._places = self._walk_tar()
        else:
            raise ValueError(f"{self.path} is neither a folder nor a tar file")
        self.names = sorted(self._places)

    def find(self, name: str) -> str | None:
        """The stored name of an image that a table names, or None. Nothing outside the archive is ever found."""
        clean = os.path.normpath(name).replace(os.sep, "/")
        return clean if clean in self._places else None

    def place(self, name: str) -> Place:
        """Where an image of `names` lies."""
        return self._places[name]

    def read(self, name: str) -> bytes:
        """The bytes of an image of `names`."""
        return self._places[name].read()

    def _walk_folder(self) -> dict[str, Place]:
        found = (Path(at, name) for at, _, names in os.walk(self.path) for name in names if image_type(name))
        return {path.relative_to(self.path).as_posix(): Place(str(path)) for path in found}

    def _walk_tar(self) -> dict[str, Place]:
        with open(self.path, "rb", buffering=1 << 18) as file:
            members = walk(file, 0, self.path.stat().st_size)
            return {m.name.removeprefix("./"): Place(str(self.path), m.offset, m.size) for m in members if image_type(m.name)}
