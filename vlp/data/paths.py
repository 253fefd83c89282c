"""Which shards a path names. Tools need it before anything heavy is imported."""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

PACKED = tuple(
    f".{name}" for name in ("tar.gz", "tgz", "tar.zst", "tzst", "tar.zstd", "tar.bz2", "tbz2", "tbz", "tar.xz", "txz")
)  # fmt: skip


def expand(path: str, packed: bool = False) -> list[Path]:
    """The tars that a `path` option names, in order; raises ValueError for a part that names none.

    `packed`: compressed tars count, too; else they are refused.
    """
    result: list[Path] = []
    for part in path.split("::"):
        for name in braceexpand(part):
            try:
                for place in _places(name):
                    result += _in_folder(place) if place.is_dir() else [place]
            except OSError as error:
                raise ValueError(unreadable(name, error)) from None
    return result if packed else plain_only(result, path)


def unreadable(name: Path | str, error: OSError) -> str:
    """What to tell of a path that the system does not let us read."""
    return (
        f"{name} cannot be read: {error.strerror}; check that it is there and that you may read it"
    )


def plain_only(shards: list[Path], path: str) -> list[Path]:
    """The shards that `path` names; raises ValueError where some are compressed."""
    compressed = [shard for shard in shards if is_packed(shard.name)]
    if compressed:
        raise ValueError(
            f"{compressed[0]} is compressed ({len(compressed)} of {len(shards)} shards are), but samples are read from any place "
            f"of a plain tar; unpack it, or write plain shards: vlp data reshard {path!r} --to DIR"
        )
    return shards


def is_packed(name: str) -> bool:
    """Whether a file is called like a compressed tar."""
    return name.lower().endswith(PACKED)


def _places(name: str) -> list[Path]:
    """The file or folder of this name, or those that a pattern with * or ? finds."""
    place = Path(name).expanduser()
    if place.exists():
        return [place]
    found = sorted(map(Path, glob.glob(str(place)))) if glob.has_magic(name) else []
    if not found:
        raise ValueError(
            f"shards path {name!r} is neither a folder nor a tar file; {_nearest(place)}"
        )
    return found


def shards_in(folder: Path) -> list[Path]:
    """The tars of a folder, plain or compressed, in order of name. A compressed one beside its
    plain tar is left out.
    """
    entries = _entries(folder) if folder.is_dir() else []
    plain = [name for name in entries if name.lower().endswith(".tar")]
    stems = {name.lower() for name in plain}
    compressed = [name for name in entries if is_packed(name) and f"{_stem(name)}.tar" not in stems]
    return [folder / name for name in sorted(plain + compressed)]


def _in_folder(folder: Path) -> list[Path]:
    shards = shards_in(folder)
    if not shards:
        raise ValueError(
            f"shards path '{folder}' is a folder without .tar files; {_contents(folder, _entries(folder))}"
        )
    return shards


def _entries(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _stem(name: str) -> str:
    ending = next(ending for ending in PACKED if name.lower().endswith(ending))
    return name[: -len(ending)].lower()


def _contents(folder: Path, names: list[str]) -> str:
    """What a folder holds instead of shards, and what can be done with it."""
    below = [name for name in names if any((folder / name).glob("*.tar"))]
    if below:
        folders = ", ".join(below[:5])
        return f"there are some in its folders {folders}; name them, joined by :: or as {folder}/*/*.tar"
    kinds = Counter(
        "folders" if (folder / name).is_dir() else Path(name).suffix.lower() or "no extension"
        for name in names
    )
    held = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "nothing"
    return (
        f"it holds {held}; expected shards as `vlp data pack {folder} --to DIR` writes them of "
        "images (training reads those with {name: folder} or {name: classes}, too)"
    )


def _nearest(place: Path) -> str:
    """The part of a path that is there."""
    there = next((str(parent) for parent in place.parents if parent.exists()), "")
    return (
        f"there is {there}, but no {place.name} in it"
        if there == str(place.parent)
        else f"of the path only {there} is there"
    )
