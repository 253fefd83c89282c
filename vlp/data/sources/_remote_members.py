"""Where the members of remote shards' samples lie that the index passes over: a copy of the file
beside the shards, or one that is made here of shards that are fetched once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from vlp import log
from vlp.data.fetch import Cache, folder_and_name
from vlp.data.index import Saving, alone
from vlp.data.member_file import NAME, OfShard, may_have, of_shard, save_members, usable_members
from vlp.data.rows import Shard
from vlp.data.sources._remote_index import copied, members_made_here


def members_of(
    urls: Sequence[str], shards: Sequence[Shard], changed: Set[str], cache: Cache
) -> list[OfShard | None]:
    """What is known of the members of the shards at the addresses; None: they have none.

    shards: as their index says; changed: the addresses of those that changed since they were
    fetched here. Raises ValueError, OSError.
    """
    folders: dict[str, dict[str, Shard]] = {}
    for url, shard in zip(urls, shards, strict=True):
        if may_have(shard):
            folders.setdefault(folder_and_name(url)[0], {})[url] = shard

    by_url: dict[str, OfShard] = {}
    for folder, of_folder in folders.items():
        by_url |= _of_folder(folder, of_folder, changed, cache)
    return [by_url.get(url) for url in urls]


def _of_folder(
    folder: str, shards: Mapping[str, Shard], changed: Set[str], cache: Cache
) -> dict[str, OfShard]:
    copy = copied(next(iter(shards)), NAME, cache)
    beside = {} if copy is None else usable_members(copy)
    place = members_made_here(folder)

    known = _known(shards, changed, beside, usable_members(place))
    if len(known) == len(shards):
        return known
    with alone(place, f"the places of members of {folder}"):
        # Whoever this one waited for may have found them.
        others = usable_members(place)
        known = _known(shards, changed, beside, others)
        unknown = [url for url in shards if url not in known]
        if unknown:
            log.warn(
                f"{len(unknown)} of {len(shards)} shards have no {NAME} beside them that tells of "
                "their members; each is fetched once to find them"
            )
            _find(unknown, shards, known, others, place, cache)
    return known


def _find(
    urls: Sequence[str],
    shards: Mapping[str, Shard],
    known: dict[str, OfShard],
    others: dict[str, OfShard],
    place: Path,
    cache: Cache,
) -> None:
    """Fetch and walk shards, and write what is known of them to `place`."""

    def write() -> None:
        by_name = {folder_and_name(url)[1]: one for url, one in known.items()}
        save_members(place, others | by_name)

    saving = Saving()
    try:
        for n_done, url in enumerate(urls):
            if n_done and saving.is_due():
                log.warn(f"found members in {n_done:,} of {len(urls):,} shards")
                write()
                saving.done()
            known[url] = of_shard(Path(cache.get(url)), shards[url])
    finally:  # where one cannot be had, the others are known the next time
        write()


def _known(
    shards: Mapping[str, Shard],
    changed: Set[str],
    beside: Mapping[str, OfShard],
    here: Mapping[str, OfShard],
) -> dict[str, OfShard]:
    """The shards, by address, of which a file tells: that beside them, else the one made here."""
    known = {}
    for url, shard in shards.items():
        name = folder_and_name(url)[1]
        candidates = [beside.get(name)]
        if url not in changed:
            candidates.append(here.get(name))
        fitting = [one for one in candidates if one is not None and one.fits_elsewhere(shard)]
        if fitting:
            known[url] = fitting[0]
    return known
