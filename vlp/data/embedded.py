"""Embeddings that teachers gave the samples of shards before training: written by `vlp data
embed`, read row by row.

DIR/STEM.safetensors belongs to the shard STEM.tar: `image` and `text` [n, D] float16 in the order
of its n usable samples, and metadata "model", "weights" (a hash; older files have none), "scale"
and "keys" (SHA-256 in hex of the samples' keys, one a line). A file may also hold
    views               [n, N, D] float16, of N crops of each picture (metadata "views":
                        vlp.data.stored_views)
    captions, digest    [m, D] float16 and [m] int64: a row for each different caption of the
                        shard, and the captions' digests (vlp.text_store), in their order
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from vlp.data.rows import Shard
from vlp.data.stored import source
from vlp.data.stored_views import StoredViews
from vlp.data.tensor_file import header, of_each
from vlp.text_store import digest


class Teacher(NamedTuple):
    """Which model embedded, its inverse temperature, and the width of its rows."""

    model: str
    scale: float
    width: int
    weights: str = ""  # a hash of them; "": not known


class Written(NamedTuple):
    """What all files of a folder must agree in."""

    teacher: Teacher
    views: StoredViews | None
    every_caption: bool  # the rows of all captions are there, not only those of the first


class Embeddings:
    """What `folder` holds for some shards. Raises ValueError where it does not fit them.

    `with_text`: the captions of training are those that were embedded, the first ones; where every
    caption is, they are in any case.
    """

    def __init__(self, folder: str, paths: list[str], shards: list[Shard], with_text: bool) -> None:
        self.folder = folder

        self._files = files_beside(folder, paths, "embeddings")

        # Rows of two models cannot be compared.
        written = dict(zip(of_each(_check, self._files, shards), self._files))
        if len(written) > 1:
            listed = "; ".join(f"{path}: {by}" for by, path in written.items())
            raise ValueError(
                f"embeddings {folder!r} are of several models or of several kinds ({listed}); "
                "make them anew with `vlp data embed`"
            )
        [(self.teacher, self.views, self.every_caption)] = written
        self.with_text = with_text or self.every_caption
        self._times = [path.stat().st_mtime_ns for path in self._files]

    def image(self, shard: int, i: int, view: int | None = None) -> np.ndarray:
        """The embedding, float16 [D], of the picture of sample i of a shard: of the whole of it, or
        of one of its stored views.
        """
        file = self._opened(shard)
        if view is None:
            return file.get_slice("image")[i]
        return file.get_slice("views")[i, view]

    def text(self, shard: int, i: int, caption: str | None = None) -> np.ndarray:
        """The embedding, float16 [D], of the first caption of sample i of a shard, or of `caption`
        where every caption is stored; ValueError where that one is not.
        """
        file = self._opened(shard)
        if caption is None or not self.every_caption:
            return file.get_slice("text")[i]

        digests, wanted = _digests(self._files[shard], self._times[shard]), digest(caption)
        place = int(np.searchsorted(digests, wanted))
        if place == len(digests) or digests[place] != wanted:
            shown = caption if len(caption) <= 60 else f"{caption[:60]}…"
            raise ValueError(
                f"{self._files[shard]} has no embedding of the caption {shown!r}; embed what the "
                "run draws: `vlp data embed` with --captions, --lines or --sentences"
            )
        return file.get_slice("captions")[place]

    def images(self, shard: int) -> np.ndarray:
        """All image embeddings of a shard, float16 [n, D]."""
        return self._opened(shard).get_tensor("image")

    def mapped(self, shard: int, side: str) -> np.ndarray:
        """All rows of one side, "image" or "text", of a shard, float16 [n, D], mapped from the
        file: only the parts that are read take memory.
        """
        return mapped(self._files[shard], side)

    def file(self, shard: int) -> Path:
        """Where the embeddings of a shard lie."""
        return self._files[shard]

    def _opened(self, shard: int) -> Any:
        return _opened(self._files[shard], self._times[shard])


def files_beside(folder: str, paths: Sequence[str], kind: str) -> list[Path]:
    """The files of a folder that belong to shards; ValueError where two shards would share one."""
    # Found by the shards' names alone, because data sets are moved.
    where = source(folder)
    files = [where / f"{Path(path).stem}.safetensors" for path in paths]
    if len(set(files)) < len(files):
        raise ValueError(
            f"{kind} {folder!r}: several shards have one name; "
            "make each folder of shards a source of its own"
        )
    return files


def mapped(path: Path, name: str) -> np.ndarray:
    """A float16 tensor [n, D] of a .safetensors file, mapped."""
    local = Path(os.fspath(path))  # all of it is wanted
    about = header(local)
    shape = about.shapes[name]
    if not all(shape):  # an empty file cannot be mapped
        return np.zeros(shape, np.float16)
    return np.memmap(local, np.float16, "r", about.places[name][0], shape)


class Ensemble:
    """The stored embeddings of one teacher, or of several, of the same samples."""

    def __init__(self, members: Sequence[Embeddings]) -> None:
        """Raises ValueError for members whose crops differ: a student sees one at a time."""
        self.members = tuple(members)
        self.views = self.members[0].views
        for member in self.members[1:]:
            if member.views != self.views:
                first = self.members[0]
                raise ValueError(
                    f"{first.folder} is of {_crops(first)}, {member.folder} of {_crops(member)}; "
                    "embed both with the same --views, --seed and --augment of `vlp data embed`, "
                    "by models that decode pictures alike"
                )

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        return tuple(member.teacher for member in self.members)

    @property
    def scale(self) -> float | tuple[float, ...]:
        """The inverse temperature of the teacher, or those of several."""
        scales = tuple(teacher.scale for teacher in self.teachers)
        return scales[0] if len(scales) == 1 else scales

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row: [D'], or [T, D'] of several teachers, D' of the widest."""
        widths = [teacher.width for teacher in self.teachers]
        return (widths[0],) if len(widths) == 1 else (len(widths), max(widths))

    @property
    def with_text(self) -> bool:
        """Whether all members have the embeddings of the captions that training draws."""
        return all(member.with_text for member in self.members)


class Stored(NamedTuple):
    """What an ensemble holds of one sample."""

    of: Ensemble
    shard: int
    place: int  # of the sample in its shard

    def image(self, view: int | None = None) -> np.ndarray:
        """The picture's embeddings, float32 of `Ensemble.shape`."""
        return self._beside([m.image(self.shard, self.place, view) for m in self.of.members])

    def text(self, caption: str) -> np.ndarray:
        """A caption's embeddings, float32 of `Ensemble.shape`; ValueError where it has none."""
        return self._beside([m.text(self.shard, self.place, caption) for m in self.of.members])

    def _beside(self, of_members: Sequence[np.ndarray]) -> np.ndarray:
        """Rows of narrower teachers filled up with zeros, as those of running ones are."""
        rows = np.zeros(self.of.shape, np.float32)
        for row, of_member in zip(np.atleast_2d(rows), of_members):
            row[: len(of_member)] = of_member
        return rows


def _crops(embeddings: Embeddings) -> str:
    """In words, which crops a folder holds."""
    views = embeddings.views
    if views is None:
        return "whole pictures"
    return f"{views.n} crops of seed {views.seed}, {views.augment}, {views.decoding}"


def _check(path: Path, shard: Shard) -> Written:
    """Whose embeddings the file of a shard holds."""
    remedy = f"make it with `vlp data embed` from the shard {shard.name}"
    try:
        about, shapes, _ = header(path)
        model, scale, keys = about["model"], float(about["scale"]), about["keys"]
        n, width = shapes["image"]
        views = StoredViews.read(about["views"]) if "views" in shapes else None
        expected: dict[str, tuple[Any, ...]] = {"image": (n, width), "text": (n, width)}
        if views is not None:
            expected["views"] = (n, views.n, width)
        if "captions" in shapes:
            expected["captions"] = (*shapes["digest"], width)
        complete = all(shapes[name] == shape for name, shape in expected.items())
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no embeddings ({type(error).__name__}: {error}); {remedy}"
        ) from None

    # Rows are found by their number alone: embeddings of other samples would be paired in silence.
    if not complete or n != shard.count or keys != shard.keys:
        listed = ", ".join(f"{name} {shapes[name]}" for name in expected)
        raise ValueError(
            f"{path} holds {listed} for other samples than the {shard.count} of {shard.name}; "
            f"{remedy}"
        )
    teacher = Teacher(model, scale, width, about.get("weights", ""))
    return Written(teacher, views, "captions" in shapes)


# A process keeps this many files mapped; only the rows that are read take memory.
@lru_cache(maxsize=128)
def _opened(path: Path, mtime_ns: int) -> Any:
    return safe_open(path, "numpy")


@lru_cache(maxsize=128)
def _digests(path: Path, mtime_ns: int) -> np.ndarray:
    """The digests of a shard's captions, int64 [m], rising."""
    return _opened(path, mtime_ns).get_tensor("digest")
