"""Where the image files of an unpacked data set lie: a folder, or a tar that is read without unpacking."""

from __future__ import annotations

import os
from pathlib import Path

from vlp.data.members import IMAGE_TYPES, Member, walk


def image_type(name: str) -> str:
    """The extension of a file name, lower case, or "" where it is no image type that shards hold."""
    extension = os.path.splitext(name)[1].lower().lstrip(".")
    return extension if extension in IMAGE_TYPES else ""


class Folder:
    """Images below a folder, named by their path in it with forward slashes."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(f"{self.root} is not a folder")
        found = (Path(at, name) for at, _, names in os.walk(self.root, followlinks=True) for name in names if image_type(name))
        self.names = sorted(path.relative_to(self.root).as_posix() for path in found)
        self._known = set(self.names)

    def find(self, name: str) -> str | None:
        """The name under which an image that a table names is stored, or None. Nothing outside the folder is found."""
        clean = os.path.normpath(name).replace(os.sep, "/")
        return clean if clean in self._known else None

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


class Tar:
    """Images in a tar, named by their member names."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb", buffering=1 << 18) as file:
            members = walk(file, 0, self.path.stat().st_size)
            self._members: dict[str, Member] = {m.name.removeprefix("./"): m for m in members if image_type(m.name)}
        self.names = sorted(self._members)

    def find(self, name: str) -> str | None:
        """The name under which an image that a table names is stored, or None."""
        clean = name.removeprefix("./")
        return clean if clean in self._members else None

    def read(self, name: str) -> bytes:
        member = self._members[name]
        with open(self.path, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
