"""Where evaluation images lie: files, members of tars, bytes in tables; opened one at a time, never unpacked.

A `Picture` is small and holds no open file, so that lists of them can be dealt to ranks and threads. `Contents` hashes
what the pictures hold, which names the embeddings that are kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vlp.data import picture
from vlp.data.members import IMAGE_TYPES, walk
from vlp.files import write_atomically
from vlp.types import ON_WHITE, Decoding


class DataError(ValueError):
    """An evaluation set that cannot be used as it is; the message says what was found and what to do."""


@dataclass(frozen=True)
class Picture:
    """One image: a whole file, `size` bytes at `offset` of a file (a tar's member), or `data` itself."""

    name: str  # what messages call it
    path: str = ""
    offset: int = 0
    size: int | None = None  # None: the whole file
    data: bytes | None = field(default=None, repr=False)
    box: tuple[float, float, float, float] | None = None  # left, upper, right, lower: the part that counts
    border: int = 0  # pixels to cut off every side

    def read(self) -> bytes:
        """The encoded image."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def n_bytes(self) -> int:
        """How long the encoded image is."""
        if self.data is not None:
            return len(self.data)
        return os.path.getsize(self.path) if self.size is None else self.size

    def open(self, decoding: Decoding = ON_WHITE) -> Image.Image:
        """The decoded image in RGB; a DataError names the picture that does not open."""
        try:
            image = picture.rgb(self.read(), decoding)
        except (OSError, picture.BadImage) as error:
            raise DataError(f"image {self.name} does not open ({error}); repair or remove it and its annotation") from error
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        return image.crop(self.box) if self.box else image


def is_image(name: str) -> bool:
    """Whether a file name ends like an image that may be decoded."""
    return name.rsplit(".", 1)[-1].lower() in IMAGE_TYPES


def tar_members(path: str | Path) -> dict[str, Picture]:
    """Every regular member of a tar by name, images and texts alike, without reading their contents."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            return {m.name: Picture(m.name, str(path), m.offset, m.size) for m in walk(file, 0, end)}
        except ValueError as error:
            raise DataError(f"{path}: damaged tar: {error}; fetch or pack it again") from error


class Collection:
    """Images that annotations name: the files under a folder, or the members of a tar.

    `collection.find("val2017/000000000285.jpg")` also finds the same file when only its own name agrees, provided that
    name is unique: published annotations disagree about the folders before it.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        if root.is_dir():
            found = sorted(p for p in root.rglob("*") if is_image(p.name) and p.is_file())
            self.pictures = {p.relative_to(root).as_posix(): Picture(str(p), str(p)) for p in found}
        elif root.is_file() and root.suffix == ".tar":
            self.pictures = {name: p for name, p in tar_members(root).items() if is_image(name)}
        else:
            raise DataError(f"no images at {root}: expected a folder of images or a .tar; give it as images=PATH")
        if not self.pictures:
            raise DataError(f"{root} holds no image ({', '.join(sorted(IMAGE_TYPES))}); give their folder or .tar as images=PATH")
        self.root = root
        self._by_last: dict[str, list[str]] = {}
        for name in self.pictures:
            self._by_last.setdefault(name.rsplit("/", 1)[-1], []).append(name)

    def find(self, name: str) -> Picture | None:
        """The picture an annotation means, or None."""
        if name in self.pictures:
            return self.pictures[name]
        same = self._by_last.get(name.rsplit("/", 1)[-1], [])
        return self.pictures[same[0]] if len(same) == 1 else None


def refuse_missing(missing: Sequence[str], total: int, where: object, policy: str) -> None:
    """Raise for annotations whose images are not there, unless `policy` is "skip" (the caller reports the count)."""
    if not missing or (policy == "skip" and len(missing) < total):
        return
    some = "".join(f"\n  {name}" for name in list(missing)[:10])
    more = f"\n  … and {len(missing) - 10} more" if len(missing) > 10 else ""
    advice = "none of the annotations has its image; check the path" if len(missing) >= total else (
        "fetch them, or pass missing=skip to evaluate without them (the score is then not comparable)"
    )
    raise DataError(f"{len(missing)} of {total} annotations name images that are not in {where}:{some}{more}\n{advice}")


class Contents:
    """Content hashes of files, remembered in `memory` (a JSON file) beside each file's size and time of change."""

    def __init__(self, memory: Path | None = None) -> None:
        self.memory = memory
        self.known: dict[str, list] = {}
        if memory is not None and memory.exists():
            try:
                self.known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self.known = {}  # only a memory: what is unreadable is computed again

    def digest(self, pictures: Iterable[Picture]) -> str:
        """A hash of what the pictures hold, in their order."""
        total = hashlib.sha256()
        files: dict[str, str] = {}
        for p in pictures:
            if p.data is not None:
                content = hashlib.sha256(p.data).hexdigest()
            else:
                content = files[p.path] if p.path in files else files.setdefault(p.path, self._file(p.path))
            total.update(repr((content, p.offset, p.size, p.box, p.border)).encode())
        return total.hexdigest()

    def save(self) -> None:
        """Write the memory down, where there is one."""
        if self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.memory, json.dumps(self.known).encode())

    def _file(self, path: str) -> str:
        path = os.path.abspath(path)
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
        if path not in self.known or self.known[path][:2] != stamp:
            with open(path, "rb") as file:
                self.known[path] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        return self.known[path][2]
