"""Arrays that a tool keeps beside its marks, several in one file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vlp.data import stored
from vlp.files import write_atomically


def save(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays into one file, whole or not at all."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stubs know no arrays by name
    write_atomically(path, file.getvalue())


def load(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that `save` wrote; raises ValueError for damage."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it with its mark, {path.stem}.json"
        ) from None


def load_all(paths: Iterable[Path]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each file in turn; of a store many are fetched at the same time."""
    paths = list(paths)
    stored.bring(paths)
    return map(load, paths)
