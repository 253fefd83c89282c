"""Embeddings that a teacher gave the samples of shards before training: written by `vlp data
embed`, read row by row.

DIR/STEM.safetensors belongs to the shard STEM.tar: `image` and `text` [n, D] float16 in the order
of its n usable samples, and metadata "model", "weights" (a hash; older files have none), "scale"
and "keys" (SHA-256 in hex of the samples' keys, one a line).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vlp.data.rows import Shard


class Teacher(NamedTuple):
    """Which model embedded, its inverse temperature, and the width of its rows."""

    model: str
    scale: float
    width: int
    weights: str = ""  # a hash of them; "": not known


class Embeddings:
    """What `folder` holds for some shards. Raises ValueError where it does not fit them.

    `with_text`: the captions of training are those that were embedded, the first ones.
    """

    def __init__(self, folder: str, paths: list[str], shards: list[Shard], with_text: bool) -> None:
        self.folder = folder
        self.with_text = with_text

        # Found by the shards' names alone, because data sets are moved.
        where = Path(folder).expanduser()
        self._files = [where / f"{Path(path).stem}.safetensors" for path in paths]
        if len(set(self._files)) < len(self._files):
            raise ValueError(
                f"embeddings {folder!r}: several shards have one name; "
                "make each folder of shards a source of its own"
            )

        # Rows of two models cannot be compared.
        teachers = {_check(path, shard): path for path, shard in zip(self._files, shards)}
        if len(teachers) > 1:
            listed = "; ".join(f"{path}: {teacher}" for teacher, path in teachers.items())
            raise ValueError(
                f"embeddings {folder!r} are of several models ({listed}); "
                "make them anew with `vlp data embed`"
            )
        [self.teacher] = teachers
        self._times = [path.stat().st_mtime_ns for path in self._files]

    def row(self, shard: int, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and text embedding, float16 [D] each, of sample i of a shard."""
        file = _opened(self._files[shard], self._times[shard])
        return file.get_slice("image")[i], file.get_slice("text")[i]

    def images(self, shard: int) -> np.ndarray:
        """All image embeddings of a shard, float16 [n, D]."""
        return _opened(self._files[shard], self._times[shard]).get_tensor("image")

    def mapped(self, shard: int, side: str) -> np.ndarray:
        """All rows of one side, "image" or "text", of a shard, float16 [n, D], mapped from the
        file: only the parts that are read take memory.
        """
        path = self._files[shard]
        with open(path, "rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            about = json.loads(file.read(n_header))[side]
        start = 8 + n_header + about["data_offsets"][0]
        shape = tuple(about["shape"])
        if not all(shape):  # an empty file cannot be mapped
            return np.zeros(shape, np.float16)
        return np.memmap(path, np.float16, "r", start, shape)


def _check(path: Path, shard: Shard) -> Teacher:
    """Whose embeddings the file of a shard holds."""
    remedy = f"make it with `vlp data embed` from the shard {shard.name}"
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata()
            shapes = [tuple(file.get_slice(name).get_shape()) for name in ("image", "text")]
        model, scale, keys = about["model"], float(about["scale"]), about["keys"]
        (n, width), _ = shapes
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no embeddings ({type(error).__name__}: {error}); {remedy}"
        ) from None

    # Rows are found by their number alone: embeddings of other samples would be paired in silence.
    if shapes[0] != shapes[1] or n != shard.count or keys != shard.keys:
        raise ValueError(
            f"{path} holds {shapes[0]} images and {shapes[1]} texts for other samples than the "
            f"{shard.count} of {shard.name}; {remedy}"
        )
    return Teacher(model, scale, width, about.get("weights", ""))


# A process keeps this many files mapped; only the rows that are read take memory.
@lru_cache(maxsize=128)
def _opened(path: Path, mtime_ns: int) -> Any:
    return safe_open(path, "numpy")
