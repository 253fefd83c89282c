"""Which shards a path names. Tools need it before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

from braceexpand import braceexpand


def expand(path: str) -> list[Path]:
    """The tars that a `path` option names, in order; raises ValueError for a part that names none."""
    result: list[Path] = []
    for part in path.split("::"):
        for name in braceexpand(part):
            place = Path(name).expanduser()
            found = sorted(place.glob("*.tar")) if place.is_dir() else [place] if place.is_file() else []
            if not found:
                reason = "a folder without .tar files" if place.is_dir() else "neither a folder nor a tar file"
                raise ValueError(f"shards path {name!r} is {reason}; expected shards as `vlp data pack` writes them")
            result += found
    return result
