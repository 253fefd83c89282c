"""What lies in a folder of a model, and which of it an export wrote."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

MANIFEST = "vlp_export.json"  # of an export: its name and the files that it wrote


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a ValueError says what is wrong with it."""
    value = any_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def any_json(path: Path) -> Any:
    """What JSON a file holds; a ValueError says what is wrong with it."""
    # Editors of Windows put a mark in front.
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unrepeated)
    except FileNotFoundError:
        raise ValueError(
            f"{path.parent} holds no {path.name}; it holds {listing(path.parent)}"
        ) from None
    # A million brackets are JSON, too, and deeper than the parser goes.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); export or download it again") from None


class RepeatedKeyError(ValueError):
    """A key that stands twice in an object of JSON: readers differ in which value counts."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON by its pairs, for `object_pairs_hook`; RepeatedKeyError for a key that
    stands twice.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        # A table may be an object of a million images.
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, n in counts.items() if n > 1)
        raise RepeatedKeyError(f"the key {repeated!r} stands twice in one object")
    return value


def files_of(folder: Path) -> list[str]:
    """The files below a folder, links among them, by their path in it."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    ]


def exported_files(folder: Path) -> list[str]:
    """The files that an export wrote there, by its own list; none where it is no export."""
    if not (folder / MANIFEST).is_file():
        return []
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise ValueError(
            f"{folder / MANIFEST} does not list the files of an export; export the model again"
        )
    return files


def listing(folder: Path, most: int = 8) -> str:
    """The names in a folder for a message, folders with a slash."""
    if not folder.is_dir():
        return "nothing: there is no such folder"
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "nothing"

    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
