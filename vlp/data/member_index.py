"""Where the members of local shards' samples lie that the index passes over: from the file beside
the shards (`vlp.data.member_file`), or in the cache where the folder cannot be written.

A shard that is not named there, or differs from what the index says of it, is walked by its headers
once. One process of a machine does it, and the others wait for it. Shards in which the index passed
nothing of the kind over are not walked, and have no place in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlp import log
from vlp.data.index import Saving, alone, places, present, save
from vlp.data.member_file import NAME, OfShard, may_have, of_shard, open_members, save_members
from vlp.data.rows import Shard

OfFolder = dict[Path, Shard]


def located(paths: Sequence[Path], shards: Sequence[Shard]) -> list[OfShard | None]:
    """What is known of the members of the shards at `paths`, in that order; None: they have none.

    shards: as the index says. Raises ValueError, OSError.
    """
    folders: dict[Path, OfFolder] = {}
    for path, shard in zip(paths, shards, strict=True):
        if may_have(shard):
            folders.setdefault(path.parent, {})[path] = shard

    by_path: dict[Path, OfShard] = {}
    for folder, of_folder in folders.items():
        by_path |= _of_folder(folder, of_folder)
    return [by_path.get(path) for path in paths]


def _of_folder(folder: Path, shards: OfFolder) -> dict[Path, OfShard]:
    known = _known(folder, shards)
    if _unknown(known, shards):
        with alone(places(folder, NAME)[1], f"the places of members of {folder}"):
            # Whoever this one waited for may have found them.
            known = _known(folder, shards)
            if _unknown(known, shards):
                _find(folder, known, shards)
    return {path: known[path.name] for path in shards}


def _known(folder: Path, shards: OfFolder) -> dict[str, OfShard]:
    """What the files that there are of a folder say of each shard: the first that fits it."""
    indexed = {path.name: shard for path, shard in shards.items()}
    known: dict[str, OfShard] = {}
    for place in places(folder, NAME):
        try:
            here = open_members(place)
        except OSError:
            continue  # there is none
        except ValueError as error:
            log.warn(f"{place} is not usable ({error}); the headers of its shards are read again")
            continue
        # Where data are shared for reading, the file beside them may be older than the cache's.
        for name, of_one in here.items():
            if name not in known or (name in indexed and not known[name].fits(indexed[name])):
                known[name] = of_one
        if not _unknown(known, shards):
            break
    return known


def _unknown(known: dict[str, OfShard], shards: OfFolder) -> OfFolder:
    unknown = {}
    for path, shard in shards.items():
        of_one = known.get(path.name)
        if of_one is None or not of_one.fits(shard):
            unknown[path] = shard
    return unknown


def _find(folder: Path, known: dict[str, OfShard], shards: OfFolder) -> None:
    """Walk the shards of a folder that are not known, and write its file."""
    unknown = _unknown(known, shards)
    names = {path.name for path in shards}
    told = f"the places of members of {folder}"

    def write() -> None:
        kept = present(folder, known, names)
        save(folder, NAME, told, lambda place: save_members(place, kept))

    saving = Saving()
    try:
        for n_done, (path, shard) in enumerate(unknown.items()):
            if n_done and saving.is_due():
                log.warn(f"found members in {n_done:,} of {len(unknown):,} shards of {folder}")
                write()
                saving.done()
            known[path.name] = of_shard(path, shard)
    finally:  # where one cannot be read, the others are known the next time
        write()


# --- of shards that are written into a store -----------------------------------------------------


def piece_of(path: Path) -> Path:
    """What is known of the members of one shard, beside it, until the folder is finished."""
    return path.with_name(f".{path.stem}.members")


def save_piece(path: Path, tar: Path, shard: Shard) -> None:
    """Note the members of the shard that will lie at `path`, while its tar is on this machine."""
    if may_have(shard):
        save_members(piece_of(path), {path.name: of_shard(tar, shard)})


def join_pieces(paths: Sequence[Path], shards: Sequence[Shard]) -> None:
    """Write the file of a store's folder that is finished, of what was noted of its shards: whoever
    trains on them would have to fetch all to find their members.
    """
    having = [(path, shard) for path, shard in zip(paths, shards, strict=True) if may_have(shard)]
    if not having:
        return

    written = {}
    for path, shard in having:
        of_one = _opened(piece_of(path)).get(path.name)
        if of_one is not None and of_one.fits_elsewhere(shard):
            written[path.name] = of_one
    # That of the folder tells of shards that an earlier call wrote.
    beside = paths[0].parent / NAME
    if written:
        save_members(beside, _opened(beside) | written)
    for path, _ in having:
        piece_of(path).unlink(missing_ok=True)


def _opened(place: Path) -> dict[str, OfShard]:
    try:
        return open_members(place)
    except (OSError, ValueError):
        return {}
