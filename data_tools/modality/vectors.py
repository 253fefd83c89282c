"""Numbers that any other model gave a sample, in a member KEY.NAME.npy."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlp.data.further_members import Member
from vlp.data_tools.modality.members import of_keys


@dataclass(frozen=True)
class Vectors:
    """[F] or [T, F] numbers of each sample, of which T may differ."""

    name: str
    shape: tuple[int, int]

    @classmethod
    def of(cls, name: str, shape: str, sources: list[Path]) -> Vectors:
        """The shape as written, or that of the first sample that has the member; ValueError where
        there is none.
        """
        if shape:
            parts = shape.lower().split("x")
            if not all(part.isdecimal() and int(part) for part in parts) or len(parts) > 2:
                raise ValueError(f"--shape {shape!r}: expected numbers such as 768 or 8x768")
            length, features = ([1, *map(int, parts)])[-2:]
            return cls(name, (length, features))
        return cls(name, _first_shape(name, sources))

    def settings(self) -> dict[str, Any]:
        return {"kind": "vectors", "name": self.name, "shape": list(self.shape)}

    def members(self, of_sample: list[Member]) -> list[Member]:
        return [m for m in of_sample if m.extension == "npy" and m.infix in (self.name, "")][-1:]

    def rows(self, files: list[bytes]) -> np.ndarray:
        rows = array(files[0])
        length, features = self.shape
        if rows.shape[1] != features or not 1 <= len(rows) <= length:
            raise ValueError(
                f"an array {list(rows.shape)}; expected up to {length} rows of {features}"
            )
        return rows


def array(data: bytes) -> np.ndarray:
    """[t, F] float32 of a .npy file; ValueError for one that is none."""
    try:
        # No pickle: it would run code.
        rows = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"no array of numbers ({type(error).__name__})") from None
    if not isinstance(rows, np.ndarray) or rows.ndim not in (1, 2) or rows.dtype.kind not in "fiu":
        raise ValueError("no array of numbers, [F] or [T, F]")
    return np.atleast_2d(rows).astype(np.float32)


def _first_shape(name: str, sources: list[Path]) -> tuple[int, int]:
    from vlp.data_tools._run.shards import samples

    counts: Counter[str] = Counter()
    for path in sources:
        keys = [sample.key for sample in samples(path, counts)]
        members = of_keys(path, keys, counts)
        with open(path, "rb") as file:
            for key in keys:
                for member in Vectors(name, (1, 1)).members(members.get(key, [])):
                    length, features = array(member.read(file)).shape
                    return length, features
    raise ValueError(
        f"no sample has a member KEY.{name}.npy; name what stands between key and .npy with "
        "--vectors"
    )
