"""Which shards a path names. Tools need it before anything heavy is imported."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections import Counter
from pathlib import Path

from braceexpand import braceexpand

from vlp.data import stores
from vlp.data.stored import StoredPath, source
from vlp.privacy import address

# Endings of compressed tars.
PACKED = (
    ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.zstd", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz",
    ".txz",
)  # fmt: skip


def expand(path: str, packed: bool = False) -> list[Path]:
    """The tars that a `path` option names, in order; raises ValueError for a part that names none.

    `packed`: compressed tars count, too; else they are refused.
    """
    names: list[str] = []
    for part in path.split("::"):
        names += braceexpand(part)

    shards: list[Path] = []
    for name in names:
        try:
            for place in _places(name):
                shards += _in_folder(place) if place.is_dir() else [place]
        except OSError as error:
            raise ValueError(unreadable(name, error)) from None

    return shards if packed else plain_only(shards, path)


def unreadable(name: Path | str, error: OSError) -> str:
    """What to tell of a path that the system does not let us read."""
    if error.errno is None:  # a store's, which tells all
        return str(error)
    return (
        f"{name} cannot be read: {error.strerror}; check that it is there and that you may read it"
    )


def plain_only(shards: list[Path], path: str) -> list[Path]:
    """The shards that `path` names; raises ValueError where some are compressed."""
    compressed = [shard for shard in shards if is_packed(shard.name)]
    if compressed:
        raise ValueError(
            f"{compressed[0]} is compressed ({len(compressed)} of {len(shards)} shards are), but "
            "samples are read from any place of a plain tar; unpack it, or write plain shards: "
            f"vlp data reshard {path!r} --to DIR"
        )
    return shards


def is_packed(name: str) -> bool:
    """Whether a file is called like a compressed tar."""
    return name.lower().endswith(PACKED)


def _places(name: str) -> list[Path]:
    """The file or folder of this name, or those that a pattern with * or ? finds."""
    if stores.is_address(name) and not name.startswith("file://"):
        return _in_store(name)

    # First by its name: a folder may be called `a[1]`.
    place = source(name)
    if place.exists():
        return [place]

    places = sorted(map(Path, glob.glob(str(place)))) if glob.has_magic(name) else []
    if not places:
        raise ValueError(
            f"shards path {name!r} is neither a folder nor a tar file; {_nearest(place)}"
        )
    return places


def _in_store(name: str) -> list[Path]:
    """The same of an address."""
    place = source(name)
    assert isinstance(place, StoredPath)
    if place.exists():
        return [place]

    # Folder by folder, because a star stands for no slash.
    patterns = place.parts
    plain = next((i for i, part in enumerate(patterns) if glob.has_magic(part)), len(patterns))
    places: list[Path] = []
    if 2 <= plain < len(patterns):
        for path in StoredPath(*patterns[:plain]).rglob("*"):
            fits = len(path.parts) == len(patterns)
            if fits and all(map(fnmatch.fnmatchcase, path.parts, patterns)):
                places.append(path)
    if not places:
        raise ValueError(
            f"shards path {address(name)!r} names neither a file nor a folder with files; "
            "look at its spelling, at its bucket or server, and at your right to read it. "
            "Of http:// name each shard: https://host/{00000..00041}.tar"
        )
    return places


def shards_in(folder: Path) -> list[Path]:
    """The tars of a folder, plain or compressed, in order of name. A compressed one beside its
    plain tar is left out.
    """
    entries = _entries(folder) if folder.is_dir() else []
    plain = [name for name in entries if name.lower().endswith(".tar")]

    # Read with its plain tar beside it, each of its samples would count twice.
    plain_names = {name.lower() for name in plain}
    compressed = [
        name for name in entries if is_packed(name) and f"{_stem(name)}.tar" not in plain_names
    ]
    return [folder / name for name in sorted(plain + compressed)]


def _in_folder(folder: Path) -> list[Path]:
    shards = shards_in(folder)
    if not shards:
        contents = _contents(folder, _entries(folder))
        raise ValueError(f"shards path '{folder}' is a folder without .tar files; {contents}")
    return shards


def _entries(folder: Path) -> list[str]:
    if isinstance(folder, StoredPath):
        names = [path.name for path in folder.iterdir()]
    else:
        names = os.listdir(folder)
    return sorted(name for name in names if not name.startswith("."))


def _stem(name: str) -> str:
    ending = next(ending for ending in PACKED if name.lower().endswith(ending))
    return name[: -len(ending)].lower()


def _contents(folder: Path, names: list[str]) -> str:
    """What a folder holds instead of shards, and what can be done with it."""
    # The commonest slip: the folder above the shards.
    below = [name for name in names if any((folder / name).glob("*.tar"))]
    if below:
        folders = ", ".join(below[:5])
        return (
            f"there are some in its folders {folders}; "
            f"name them, joined by :: or as {folder}/*/*.tar"
        )

    kinds: Counter[str] = Counter()
    for name in names:
        is_folder = (folder / name).is_dir()
        kinds["folders" if is_folder else Path(name).suffix.lower() or "no extension"] += 1
    common = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(5)) or "nothing"
    return (
        f"it holds {common}; expected shards as `vlp data pack {folder} --to DIR` writes them of "
        "images (training reads those with {name: folder} or {name: classes}, too)"
    )


def _nearest(place: Path) -> str:
    """The part of a path that is there."""
    there = next((str(parent) for parent in place.parents if parent.exists()), "")
    if there == str(place.parent):
        return f"there is {there}, but no {place.name} in it"
    return f"of the path only {there} is there"
