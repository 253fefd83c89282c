"""A library: the embeddings of a collection of pictures, on disk in parts.

FOLDER/library.json              the model whose embeddings they are (a hash of weights and
                                 preprocessing) and D
FOLDER/parts/NAME.safetensors    "rows" [n, D] float16 unit rows, zeros for pictures that do not
                                 open; metadata "pictures": for each its path, place and time of
                                 change, as JSON

A part is written as soon as its pictures are embedded, so a call that is stopped loses at most one.
A later call embeds what is new or has changed; what is no longer there is not found any more.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vlp import caches, locks, log
from vlp.eval import embed
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture
from vlp.files import remove_leftovers, write_atomically

PART = 1024  # pictures a part
PROGRESS_S = 5  # seconds between lines of progress
_ADVICE = "Wait until it is done; this call would embed the same pictures."
_SHOWN = 3  # pictures that do not open which are named


@dataclass
class Part:
    """Rows of one file: the number of the first, how many, and which of them count."""

    path: Path
    first: int
    counts: np.ndarray  # [n] bool: pictures that were asked for and opened

    def rows(self) -> np.ndarray:
        """[n, D] float16; zeros where a picture does not count, which no search finds."""
        with safe_open(self.path, framework="np") as file:
            rows = file.get_tensor("rows")
        rows[~self.counts] = 0
        return rows


@dataclass(eq=False)  # each is one of its own
class Library:
    """The embeddings of some pictures, numbered through, part after part."""

    folder: Path
    width: int  # D
    parts: list[Part]
    pictures: dict[int, Picture]  # by number, those that count
    unreadable: list[str] = field(default_factory=list)  # names of pictures that do not open

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first row, rows [n, D]) of each part."""
        for part in self.parts:
            yield part.first, part.rows()

    def rows_of(self, numbers: Sequence[int]) -> Tensor:
        """[n, D] float16 of these pictures, each read by itself."""
        firsts = [part.first for part in self.parts]
        rows = torch.empty(len(numbers), self.width, dtype=torch.float16)
        for place, number in enumerate(numbers):
            part = self.parts[bisect.bisect_right(firsts, number) - 1]
            row = number - part.first
            with safe_open(part.path, framework="pt") as file:
                rows[place] = file.get_slice("rows")[row : row + 1][0]
        return rows

    def digest(self) -> str:
        """A hash of what is searched."""
        total = hashlib.sha256()
        for part in self.parts:
            total.update(part.path.name.encode() + part.counts.tobytes())
        return total.hexdigest()[:24]


def place_of(encoder: Encoder, places: str) -> Path:
    """Where the library of a collection lies unless a person names a folder: beside the caches."""
    absolute = [os.path.abspath(os.path.expanduser(place)) for place in places.split("::")]
    name = hashlib.sha256(repr((_made_by(encoder), absolute)).encode()).hexdigest()[:24]
    return caches.cache_folder() / "search" / name


def update(folder: Path, encoder: Encoder, pictures: list[Picture], context: Context) -> Library:
    """The library in `folder`, after embedding those of `pictures` that it does not hold yet.

    Raises DataError for a folder of another model's, and where not one picture opens.
    """
    with ExitStack() as stack:
        stack.enter_context(locks.held(folder, advice=_ADVICE))
        caches.hold(folder)  # also while it is searched, which takes no lock
        width = _claim(folder, encoder)
        remove_leftovers(folder / "parts")

        identities = _identities(pictures)
        held = {identity for part in _stored(folder) for identity in part[1]}
        new = [place for place, identity in enumerate(identities) if identity not in held]
        _embed_all(
            folder, encoder, [pictures[i] for i in new], [identities[i] for i in new], context
        )
        library = _open(folder, width, dict(zip(identities, pictures)))

    if not library.pictures:
        raise DataError(
            f"not one of {len(pictures):,} pictures opens, such as {library.unreadable[0]}; "
            "expected pictures that Pillow reads"
        )
    if library.unreadable:
        names = ", ".join(library.unreadable[:_SHOWN])
        log.warn(f"{len(library.unreadable):,} pictures do not open and are not found: {names}")
    return library


def _made_by(encoder: Encoder) -> str:
    """What decides about an embedding."""
    parts = (encoder.fingerprint, repr(encoder.decoding), str(encoder.autocast))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _claim(folder: Path, encoder: Encoder) -> int:
    """D, after writing or comparing library.json."""
    file = folder / "library.json"
    about = {"model": encoder.name, "made_by": _made_by(encoder)}
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            made_by, width = known["made_by"], int(known["width"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{file} is damaged; remove {folder}, or name another --index"
            ) from None
        if made_by != about["made_by"]:
            raise DataError(
                f"{folder} holds the embeddings of {known.get('model')} and not of {encoder.name}, "
                "or of another version or precision of it; name another folder with --index"
            )
        return width

    # Somebody else's folder, by a slip.
    if others := sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")):
        raise DataError(f"{folder} holds {others[0]} and is no library; name an empty folder")
    width = encoder.encode_texts(["a"]).shape[1]
    (folder / "parts").mkdir()
    write_atomically(file, json.dumps(about | {"width": width}, indent=1).encode())
    return width


def _identities(pictures: list[Picture]) -> list[str]:
    """What tells a picture, and a picture that has changed: its place, size and time."""
    stamps: dict[str, str] = {}
    identities = []
    for picture in pictures:
        path = os.path.abspath(picture.path)
        if path not in stamps:  # a tar holds many
            status = os.stat(path)
            stamps[path] = f"{status.st_size}-{status.st_mtime_ns}"
        identities.append(f"{path}\n{picture.offset}\n{picture.size}\n{stamps[path]}")
    return identities


def _stored(folder: Path) -> list[tuple[Path, list[str], np.ndarray]]:
    """(file, identities, which opened) of each part; one that is damaged is removed and said."""
    stored = []
    for path in sorted((folder / "parts").glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                identities = json.loads(file.metadata()["pictures"])
                opened = file.get_tensor("rows").any(1)
        except Exception as error:  # safetensors', json's and the system's own kinds
            log.warn(f"{path} is damaged ({error}); its pictures are embedded again")
            path.unlink()
            continue
        stored.append((path, identities, opened))
    return stored


def _embed_all(
    folder: Path,
    encoder: Encoder,
    pictures: list[Picture],
    identities: list[str],
    context: Context,
) -> None:
    """Embed pictures and write them part by part."""
    start = last_line = time.monotonic()
    for first in range(0, len(pictures), PART):
        of_part = pictures[first : first + PART]
        rows = _embed(encoder, of_part, context)

        metadata = {"pictures": json.dumps(identities[first : first + PART])}
        data = save({"rows": rows.half()}, metadata)
        name = hashlib.sha256(metadata["pictures"].encode()).hexdigest()[:24]
        write_atomically(folder / "parts" / f"{name}.safetensors", data)

        now = time.monotonic()
        if context.progress and (now - last_line > PROGRESS_S or first + PART >= len(pictures)):
            last_line = now
            n_done = first + len(of_part)
            speed = n_done / (now - start)
            left_s = (len(pictures) - n_done) / speed
            print(
                f"  pictures {n_done:,}/{len(pictures):,}  {speed:,.0f}/s  {left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _embed(encoder: Encoder, pictures: list[Picture], context: Context) -> Tensor:
    """[n, D] unit rows; zeros for pictures that do not open."""
    unreadable: dict[str, str] = {}
    quiet = replace(context, cache=None, contents=None, progress=False, unreadable=unreadable)
    rows = embed.images(encoder, pictures, quiet)
    broken = [picture.name in unreadable for picture in pictures]
    return torch.where(torch.tensor(broken).unsqueeze(1), 0, rows)


def _open(folder: Path, width: int, asked_for: dict[str, Picture]) -> Library:
    """The stored parts, of which only the pictures that were asked for count."""
    library = Library(folder, width, [], {})
    first = 0
    for path, identities, opened in _stored(folder):
        counts = np.zeros(len(identities), bool)
        for row, identity in enumerate(identities):
            picture = asked_for.get(identity)
            if picture is None:
                continue
            counts[row] = opened[row]
            if opened[row]:
                library.pictures[first + row] = picture
            else:
                library.unreadable.append(picture.name)

        # A part of other pictures is not read again with every question.
        if counts.any():
            library.parts.append(Part(path, first, counts))
        first += len(identities)
    return library
