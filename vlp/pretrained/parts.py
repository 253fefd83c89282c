"""Tensors of a checkpoint that several ranks wrote, each its part, read as whole ones.

The files are those of torch.distributed.checkpoint in its safetensors form: one of each rank and
kind, `shard-00001-model-00002-of-00004.safetensors`, whose header says where in the whole tensors
its parts lie. Tensors are named "kind/name" there. Nothing of it is a pickle.

torch's own reader parses the header of a file anew for each tensor that it takes from it, tensors
times ranks in all. Here the headers are read once, and what they say is small enough to be told to
every rank (`Layout`): 24 bytes a part, and no path, since machines may see a disk at other places.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

_LENGTH_BYTES = 8  # a file begins with the length of its header
_LONGEST_HEADER = 100 * 2**20  # bytes; that of the format
_OFFSETS = "DCP_SHARDING_INFO"  # in a header's metadata: JSON, {tensor: {"saved_offsets": […]}}
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or does not fit."""


class Part(NamedTuple):
    """One file's part of a tensor, as its header says."""

    dtype: torch.dtype
    begins: tuple[int, ...]  # its first element in the whole tensor
    shape: tuple[int, ...]
    file: int  # its number among the layout's
    position: int  # of its first byte in the file


@dataclass
class Cut:
    """A tensor cut along one dimension into n parts, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    dim: int
    bounds: np.ndarray  # [n + 1] int64: part k is [bounds[k], bounds[k + 1]) along `dim`
    files: np.ndarray  # [n] int64
    positions: np.ndarray  # [n] int64, in bytes

    @classmethod
    def of(cls, parts: list[Part]) -> Cut:
        """ValueError where the parts do not make a whole."""
        # As where the parts of two checkpoints were put together by hand: their values would be
        # taken for numbers of another kind.
        kinds = {(part.dtype, len(part.begins), len(part.shape)) for part in parts}
        if len(kinds) > 1 or len(parts[0].begins) != len(parts[0].shape):
            raise ValueError("the parts differ in dtype or in number of dimensions")

        # A rank may have nothing of a tensor that has fewer rows than there are ranks.
        filled = [part for part in parts if math.prod(part.shape)] or parts[:1]
        filled.sort(key=lambda part: part.begins)

        dim, shape = _cut_along(filled)
        bounds = [0]
        for part in filled:
            # As long as the whole tensor, but for the one dimension.
            begins, part_shape = [0] * len(shape), list(shape)
            if shape:
                begins[dim], part_shape[dim] = bounds[-1], part.shape[dim]
            if part.begins != tuple(begins) or part.shape != tuple(part_shape):
                raise ValueError("the parts leave gaps, or lie over one another")
            bounds.append(bounds[-1] + (part.shape[dim] if shape else 1))

        files, positions = [part.file for part in filled], [part.position for part in filled]
        numbers = [np.array(values, np.int64) for values in (bounds, files, positions)]
        return cls(filled[0].dtype, shape, dim, *numbers)


def _cut_along(parts: list[Part]) -> tuple[int, tuple[int, ...]]:
    """The first dimension in which parts are shorter than the whole tensor, and its shape."""
    n_dims = len(parts[0].shape)
    shape = tuple(max(part.begins[d] + part.shape[d] for part in parts) for d in range(n_dims))
    for d in range(n_dims):
        if any(part.shape[d] < shape[d] for part in parts):
            return d, shape
    return 0, shape


@dataclass
class Layout:
    """Where the tensors of a checkpoint lie in the files of its parts."""

    files: list[str]  # names in the checkpoint's folder
    cuts: dict[str, Cut]  # by "kind/name"

    @classmethod
    def of(cls, folder: Path, files: list[str]) -> Layout:
        """Read the headers of files in a checkpoint's folder; CheckpointError."""
        parts: dict[str, list[Part]] = {}
        for number, file in enumerate(files):
            for name, part in _parts(folder / file, number):
                parts.setdefault(name, []).append(part)

        cuts = {}
        for name in sorted(parts):
            try:
                cuts[name] = Cut.of(parts[name])
            except ValueError as error:
                raise CheckpointError(f"{folder} is damaged: of {name} {error}") from None
        return cls(files, cuts)


def _parts(path: Path, number: int) -> Iterator[tuple[str, Part]]:
    """Name and place of each part in a file, as its header says; CheckpointError."""
    try:
        with path.open("rb") as file:
            n_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))

        begins = json.loads(header.pop("__metadata__")[_OFFSETS])
        values_at = _LENGTH_BYTES + length
        for name, entry in header.items():
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            first, end = entry["data_offsets"]
            # Else the values would be looked for outside the file, or be another tensor's.
            if first < 0 or end - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not lie where its shape says")
            if values_at + end > n_bytes:
                raise ValueError("the file ends before its last values")
            begin = tuple(begins[name]["saved_offsets"])
            yield name, Part(dtype, begin, shape, number, values_at + first)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no part of a checkpoint: its header cannot be read ({error!r})"
        ) from None


@runtime_checkable
class Described(Protocol):
    """Tensors by name of which form and kind are known without reading them."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...


class Joined(Mapping[str, Tensor]):
    """The tensors of one kind by name, each made whole when it is asked for and not kept.

    What a rank holds at a time is one tensor, however large the checkpoint is.
    """

    def __init__(self, folder: Path, layout: Layout, kind: str) -> None:
        self.folder, self.files = folder, layout.files
        prefix = f"{kind}/"
        self.cuts = {
            name.removeprefix(prefix): cut
            for name, cut in layout.cuts.items()
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        cut = self.cuts[name]
        if not cut.shape:
            return self.part(cut, 0).clone()

        whole = torch.empty(cut.shape, dtype=cut.dtype)
        for k in range(len(cut.files)):
            part = self.part(cut, k)
            whole.narrow(cut.dim, int(cut.bounds[k]), part.shape[cut.dim]).copy_(part)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.cuts)

    def __len__(self) -> int:
        return len(self.cuts)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.cuts[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.cuts[name].dtype

    def rows_of(self, name: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a tensor along its first dimension, of which no others are read
        where the parts are cut along it or not at all.
        """
        cut = self.cuts[name]
        if cut.dim:
            return self[name][begin:end]

        rows = torch.empty((end - begin, *cut.shape[1:]), dtype=cut.dtype)
        for k in range(len(cut.files)):
            first, last = max(begin, int(cut.bounds[k])), min(end, int(cut.bounds[k + 1]))
            if first < last:
                start = int(cut.bounds[k])
                part = self.part(cut, k, first - start, last - start)
                rows[first - begin : last - begin].copy_(part)
        return rows

    def part(self, cut: Cut, k: int, first: int = 0, last: int | None = None) -> Tensor:
        """Part k of a tensor, or its rows [first, last) of a tensor cut along the first dimension:
        mapped from its file, for a moment. A file that is replaced on a network disk while it is
        mapped ends the process.
        """
        shape = list(cut.shape)
        if shape:
            shape[cut.dim] = int(cut.bounds[k + 1] - cut.bounds[k])
        position = int(cut.positions[k])
        if last is not None:
            position += first * math.prod(shape[1:]) * cut.dtype.itemsize
            shape[0] = last - first
        n_bytes = math.prod(shape) * cut.dtype.itemsize
        if not n_bytes:  # nothing can be mapped
            return torch.empty(shape, dtype=cut.dtype)

        path = self.folder / self.files[cut.files[k]]
        mapped = np.memmap(path, np.uint8, "c", position, (n_bytes,))
        return torch.from_numpy(mapped).view(cut.dtype).view(shape)

    def rows(self, name: str, n_samples: int) -> Rows:
        """A table [rows, W, c], of which W ranks wrote [rows, 1, c] each, as rows of samples."""
        return Rows(self, self.cuts[name], n_samples)


class Rows:
    """A table [samples, c] in parts, of which only the rows that are asked for are read.

    In the files it is [rows, W, c]: row by row, its first two dimensions are the samples in order.
    """

    def __init__(self, tensors: Joined, cut: Cut, n_samples: int) -> None:
        self.tensors, self.cut, self.n_samples = tensors, cut, n_samples

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, samples: slice) -> Tensor:
        """[n, c], the rows of `samples`, a copy: all of them, or each step-th from the first on."""
        first, stop, step = samples.indices(self.n_samples)
        if stop != self.n_samples or not 0 <= first < max(step, 1):
            raise IndexError(f"rows are read as table[first::step] with first < step: {samples}")

        width = self.cut.shape[2]
        rows = torch.empty(len(range(first, stop, step)), width, dtype=self.cut.dtype)
        for k in range(len(self.cut.files)):
            part = self.tensors.part(self.cut, k)
            for column in range(part.shape[1]):
                self._take(rows, part[:, column], int(self.cut.bounds[k]) + column, first, step)
        return rows

    def _take(self, rows: Tensor, written: Tensor, rank: int, first: int, step: int) -> None:
        """Copy into `rows` those that the rank `rank` of the W that wrote the table kept."""
        n_ranks = self.cut.shape[1]
        # Row i of it is of sample i·W + rank, and row j here of sample first + j·step: they meet
        # at every step-th of their least common multiple, or nowhere.
        common = math.gcd(n_ranks, step)
        if (first - rank) % common:
            return
        period = step // common
        i = (first - rank) // common * pow(n_ranks // common, -1, period) % period
        j = (i * n_ranks + rank - first) // step

        target = rows[j :: n_ranks // common]
        target.copy_(written[i::period][: len(target)])


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a tensor, which is not read."""
    if isinstance(tensors, Described):
        return tensors.shape(name)
    return tuple(tensors[name].shape)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """The dtype of a tensor, which is not read."""
    if isinstance(tensors, Described):
        return tensors.dtype(name)
    return tensors[name].dtype


def rows_of(tensors: Mapping[str, Tensor], name: str, begin: int, end: int) -> Tensor:
    """A copy of the rows [begin, end) of a tensor along its first dimension; of one that is mapped
    from files, or lies in parts, no others are read.
    """
    if isinstance(tensors, Joined):
        return tensors.rows_of(name, begin, end)
    return tensors[name][begin:end].clone()


def whole_tables(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, with tables in parts made whole."""
    return {name: value[:] if isinstance(value, Rows) else value for name, value in tensors.items()}
