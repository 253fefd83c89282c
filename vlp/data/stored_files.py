"""The files of a folder in a store, and copies of them on this machine, many at a time.

Shards are few and large, and have a cache of their own (`vlp.data.fetch`). Pictures and texts of an
unpacked data set are many and small: their copies lie in a folder of whoever reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from vlp.data import stores
from vlp.data.members import is_hidden
from vlp.data.stored import StoredPath

_AT_ONCE = 32  # a store answers late, and to many at the same time


class StoredFile(NamedTuple):
    """A file below a folder of a store."""

    name: str  # its path in the folder
    address: str
    size: int  # bytes
    version: str  # tells one content from another, as far as its store does


def files_below(folder: StoredPath) -> list[StoredFile]:
    """The files of a folder and its folders, by name; raises OSError where the store fails."""
    from vlp.data.fetch import version_of

    files = []
    for address, info in stores.below(str(folder)).items():
        # Consoles of stores keep an empty object for a folder that they have made.
        if not stores.is_folder(info) and not address.endswith("/"):
            name = address.removeprefix(f"{folder}/")
            files.append(StoredFile(name, address, int(info["size"]), version_of(info)))
    return sorted(files)


def digest_of(files: Sequence[StoredFile]) -> str:
    """What tells these files from others."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.version}\n".encode(errors="surrogatepass"))
    return digest.hexdigest()


def copies(places: Sequence[tuple[str, int]], folder: Path, most: int | None = None) -> list[Path]:
    """Copies of files, by (address, bytes), in a folder of this machine; those that are there
    already stay. `most`: of a longer file only its first bytes. Raises OSError where the store
    fails.
    """

    def copied(place: tuple[str, int]) -> Path:
        return _copied(*place, folder, most)

    with ThreadPoolExecutor(_AT_ONCE, "fetch") as threads:
        return list(threads.map(copied, places))


def _copied(address: str, size: int, folder: Path, most: int | None) -> Path:
    # A store's names may lead anywhere, and are longer than some file systems allow.
    digest = hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()
    extension = os.path.splitext(address)[1][:10].replace("/", "")
    copy = folder / digest[:2] / f"{digest[2:40]}{extension}"
    n_bytes = size if most is None else min(size, most)
    if copy.is_file() and copy.stat().st_size == n_bytes:
        return copy

    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        stores.fetch(address, copy, n_bytes, partly=n_bytes < size)
    except FileNotFoundError:
        raise OSError(
            f"{address} was listed, and is not there any more; the same command begins with what "
            "is there now"
        ) from None
    return copy


def top_folder_of(name: str) -> set[str]:
    """The first folder of a name, unless it has none or that is hidden."""
    folder, slash, _ = name.partition("/")
    return {folder} if slash and not is_hidden(folder) else set()


def hidden_part(name: str) -> str:
    """A name up to its first hidden part, where that is a folder with a slash; empty where nothing
    is hidden.
    """
    parts = name.split("/")
    for i, part in enumerate(parts):
        if is_hidden(part):
            return "/".join(parts[: i + 1]) + ("/" if i + 1 < len(parts) else "")
    return ""
