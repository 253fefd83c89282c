"""What a .safetensors file says of itself, without the rest of it: of one in a store its first
bytes are fetched, not all.

The file begins with the header's length (8 bytes, little endian) and the header, JSON: of each
tensor "dtype", "shape" and "data_offsets", which count from the header's end, and "__metadata__"
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlp.data import stores
from vlp.data.stored import StoredPath, has_copy

_Other = TypeVar("_Other")
_Result = TypeVar("_Result")

_FIRST = 1 << 14  # bytes that are read at first: the header of a few tensors and all before it
_AT_THE_SAME_TIME = 32  # files that a store is asked for
_LONGEST = 100_000_000  # of a header, as safetensors itself allows


class Header(NamedTuple):
    """The metadata and the tensors of a file."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, tuple[int, int]]  # the first byte of each tensor in the file, and the end


def header(path: Path) -> Header:
    """The header of a file; raises OSError, and ValueError for one that is damaged or cut short."""
    n_bytes = path.stat().st_size
    data = part(path, 0, min(_FIRST, n_bytes))
    start = 8 + int.from_bytes(data[:8], "little")
    if n_bytes < 8 or start > min(n_bytes, _LONGEST):
        raise ValueError(f"its {n_bytes} bytes do not begin with the header of a .safetensors file")
    if start > len(data):
        data = part(path, 0, start)

    tensors = json.loads(data[8:start])
    if not isinstance(tensors, dict):
        raise ValueError("its header is no list of tensors")
    metadata = tensors.pop("__metadata__", {})
    shapes = {name: tuple(about["shape"]) for name, about in tensors.items()}
    places = {name: _place(about, start) for name, about in tensors.items()}
    end = max((end for _, end in places.values()), default=start)
    if end != n_bytes:
        raise ValueError(
            f"its tensors end at byte {end}, and the file at {n_bytes}: it is cut short"
        )
    return Header(metadata, shapes, places)


def _place(about: dict[str, Any], start: int) -> tuple[int, int]:
    first, end = about["data_offsets"]
    return start + first, start + end


def part(path: Path, start: int, stop: int) -> bytes:
    """Some bytes of a file; of one in a store, where there is no copy, only these are fetched.
    Raises OSError.
    """
    if not has_copy(path):
        return stores.part(str(path), start, stop)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def of_each(
    work: Callable[[Path, _Other], _Result], paths: Sequence[Path], others: Iterable[_Other]
) -> list[_Result]:
    """What `work` gives for each file and what belongs to it; in a store, many at a time."""
    if not any(isinstance(path, StoredPath) for path in paths):
        return list(map(work, paths, others))
    with ThreadPoolExecutor(_AT_THE_SAME_TIME, "ask") as pool:
        return list(pool.map(work, paths, others))
