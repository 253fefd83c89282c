"""Evaluation images wherever they lie: files, members of tars, bytes in tables; opened one at a
time, never unpacked.

A `Picture` is small and holds no open file, so that lists of them can be dealt to ranks and
threads. `Contents` hashes what the pictures hold, which names the embeddings that are kept on disk.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vlp.data import picture
from vlp.data.archives import Archive
from vlp.data.members import IMAGE_TYPES
from vlp.files import write_atomically
from vlp.types import ON_WHITE, Decoding

_PROBED = 128  # pictures of a set that are decoded before anything long starts


class DataError(ValueError):
    """An evaluation set that cannot be used as it is; the message says what was found and what to
    do.
    """


@dataclass(frozen=True)
class Picture:
    """One image: a whole file, `size` bytes at `offset` of a file (a tar's member), or `data`
    itself.
    """

    name: str  # what messages call it
    path: str = ""
    offset: int = 0
    size: int | None = None  # None: the whole file
    data: bytes | None = field(default=None, repr=False)
    # left, upper, right, lower: the part that counts
    box: tuple[float, float, float, float] | None = None
    border: int = 0  # pixels to cut off every side

    def read(self) -> bytes:
        """The encoded image."""
        if self.data is not None:
            return self.data
        # Opened anew each time: thousands of pictures would exhaust the open files.
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def n_bytes(self) -> int:
        """How long the encoded image is; raises OSError for a file that is gone."""
        if self.data is not None:
            return len(self.data)
        return os.path.getsize(self.path) if self.size is None else self.size

    def open(self, decoding: Decoding = ON_WHITE) -> Image.Image:
        """The decoded image in RGB; a DataError names the picture that does not open."""
        try:
            # The pixels of `picture.rgb`, bit for bit, of JPEGs in three quarters of its time.
            image = Image.fromarray(picture.array(self.read(), decoding))
        except (OSError, picture.BadImage) as error:
            raise DataError(
                f"image {self.name} does not open ({error}); repair or remove it and its annotation"
            ) from error

        # A frame around the picture, such as ObjectNet's, goes before the box is cut.
        if self.border:
            right, lower = image.width - self.border, image.height - self.border
            image = image.crop((self.border, self.border, right, lower))
        return image.crop(self.box) if self.box else image


def thumbnail(picture: Picture, side: int) -> str:
    """A WebP of at most `side` pixels as a data URI; larger pictures are scaled down, none is
    scaled up.
    """
    # Small, so that a page with all its pictures can be mailed.
    image = picture.open()
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=72)
    return f"data:image/webp;base64,{b64encode(buffer.getvalue()).decode()}"


# --- archives -------------------------------------------------------------------------------------


def open_archive(path: str | Path, below: str = "") -> Archive:
    """The pictures and texts of a folder or tar; a DataError says what is there instead."""
    try:
        return Archive(path, below)
    except ValueError as error:
        raise DataError(f"{error}; expected a folder of images or a .tar") from error


def picture_of(archive: Archive, name: str) -> Picture:
    """A stored name of an archive as a picture."""
    place = archive.place(name)
    if place.size < 0:  # a whole file
        return Picture(place.path, place.path, place.offset)
    return Picture(name, place.path, place.offset, place.size)


class Collection:
    """Images that annotations name: the files under a folder, or the members of a tar.

    Published annotations disagree about the folders before a name, so that it is found as
    `vlp.data.names` says.
    """

    def __init__(self, root: str | Path) -> None:
        if not Path(root).exists():
            raise DataError(
                f"no images at {root}: expected a folder of images or a .tar; "
                "give it as images=PATH"
            )

        self.archive = open_archive(root)
        self.root = self.archive.path
        self._meant: dict[str, str] = {}  # the first name under which a stored picture was found
        if not self.archive.names:
            left_out = f", only {self.archive.left_out}" if self.archive.left_out.counts else ""
            types = ", ".join(sorted(IMAGE_TYPES))
            raise DataError(
                f"{root} holds no image ({types}){left_out}; "
                "give their folder or .tar as images=PATH"
            )

    def anew(self) -> Collection:
        """The same images for other annotations: what one set calls them binds no other."""
        other = copy.copy(self)
        other._meant = {}
        return other

    def find(self, name: str) -> Picture | None:
        """The picture an annotation means, or None; a DataError where another name means it and the
        two contradict.
        """
        stored = self.archive.find(name)
        if stored is None:
            return None

        first_name = self._meant.setdefault(stored, name)
        if first_name != name and not self._both_mean(first_name, name, stored):
            raise DataError(
                f"the annotations name {first_name!r} and {name!r}, and {self.root} holds "
                f"{stored!r} only; give the folder with both"
            )
        return picture_of(self.archive, stored)

    def _both_mean(self, first_name: str, name: str, stored: str) -> bool:
        return self.archive.agrees(name, stored) and self.archive.agrees(first_name, stored)


# --- refusals -------------------------------------------------------------------------------------


def refuse_missing(missing: Sequence[str], total: int, where: Collection, policy: str) -> None:
    """Raise for annotations whose images are not there, unless `policy` is "skip" (the caller
    reports the count).
    """
    if not missing or (policy == "skip" and len(missing) < total):
        return

    names = list(missing)[:10]
    some = "".join(f"\n  {name} {where.archive.index.why_not(name)}" for name in names)
    more = f"\n  … and {len(missing) - 10} more" if len(missing) > 10 else ""

    # Not one image: the folder is likelier to be wrong than every name.
    if len(missing) >= total:
        advice = (
            f"none of the annotations has its image; is {where.root} the right folder? "
            f"It holds {where.archive.names[0]!r}, …"
        )
    else:
        advice = (
            "fetch them, or pass missing=skip to evaluate without them "
            "(the score is then not comparable)"
        )
    raise DataError(
        f"{len(missing)} of {total} annotations name images that are not in {where.root}:"
        f"{some}{more}\n{advice}"
    )


def refuse_unreadable(opened: Any) -> None:
    """Raise for pictures of an opened evaluation set that are gone or empty, or, of `_PROBED` of
    them, do not open.
    """
    # Sizes are cheap to ask of all; decoding is tried on a sample spread over the set.
    pictures = list(dict.fromkeys(_pictures_in(opened)))
    step = max(1, len(pictures) // _PROBED)
    problems = []
    for number, shown in enumerate(pictures):
        try:
            if not shown.n_bytes():
                problems.append(f"image {shown.name} is empty")
            elif number % step == 0:
                shown.open()
        except (DataError, OSError) as error:
            problems.append(str(error))

    if problems:
        some = "".join(f"\n  {problem}" for problem in problems[:10])
        raise DataError(
            f"{len(problems)} of {len(pictures)} images cannot be read:{some}\n"
            "repair them, or remove them and their annotations; missing: skip "
            "(vlp eval: missing=skip) puts plain gray in their place and counts them"
        )


def _pictures_in(value: Any) -> Iterator[Picture]:
    """Every picture inside of dataclasses, lists, tuples and mappings."""
    if isinstance(value, Picture):
        yield value
        return

    parts: Iterable[Any] = ()
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, key.name) for key in dataclasses.fields(value))
    elif isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    for part in parts:
        yield from _pictures_in(part)


# --- content --------------------------------------------------------------------------------------


class Contents:
    """Content hashes of files, remembered in `memory` (a JSON file) beside each file's size and
    time of change.
    """

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
        files: dict[str, str] = {}  # a tar holds many pictures and is looked at once
        for shown in pictures:
            if shown.data is not None:
                content = hashlib.sha256(shown.data).hexdigest()
            elif shown.path in files:
                content = files[shown.path]
            else:
                content = files[shown.path] = self._file(shown.path)
            place = (content, shown.offset, shown.size, shown.box, shown.border)
            total.update(repr(place).encode())
        return total.hexdigest()

    def save(self) -> None:
        """Write the memory down, where there is one."""
        if self.memory is not None:
            self.memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.memory, json.dumps(self.known).encode())

    def _file(self, path: str) -> str:
        # A file of the same size and time of change is taken for the same.
        path = os.path.abspath(path)
        status = os.stat(path)
        stamp = [status.st_size, status.st_mtime_ns]
        if path not in self.known or self.known[path][:2] != stamp:
            with open(path, "rb") as file:
                self.known[path] = [*stamp, hashlib.file_digest(file, "sha256").hexdigest()]
        return self.known[path][2]
