"""What local tars of ours were written with (`vlp.data.digests`), where they are read as a stream.

webdataset stops at the first block of zeros, and takes whatever stands under a name: a damaged tar
gives fewer samples, or others, and says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlp import log
from vlp.data import digests

_warned: set[str] = set()  # addresses; every pass would warn again


@lru_cache(maxsize=64)
def written_with(url: str) -> Mapping[str, int] | None:
    """The digests by key of a local tar's samples; None for other addresses and tars of others."""
    path = Path(url.removeprefix("file:"))
    try:
        return digests.beside(path) if path.is_file() else None
    # Statistics that are damaged, as `vlp data validate` tells; a pipe may be a long text.
    except (OSError, ValueError):
        return None


def check(url: str, key: str, members: Mapping[str, bytes]) -> None:
    """Raise ValueError unless the members, by name, are those that a sample was written with."""
    written = written_with(url)
    if written is None:
        return
    by_name = {name.removeprefix("./"): data for name, data in members.items()}
    if written.get(key) != digests.digest_of(by_name):
        raise ValueError(
            f"{key!r} is not what {url} was written with: restore the shard, or delete its "
            "_stats.json where the tar was changed on purpose"
        )


def counted(stream: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples of a stream; of each local tar a warning tells which of its samples are lost."""
    url = ""
    missing: dict[str, None] = {}
    for sample in stream:
        if sample["__url__"] != url:
            _warn_of(url, missing)
            url = sample["__url__"]
            missing = dict.fromkeys(filter(_is_whole, written_with(url) or ()))
        missing.pop(sample["__key__"].removeprefix("./"), None)
        yield sample
    _warn_of(url, missing)


def _is_whole(key: str) -> bool:
    """Whether webdataset gives the key as it is: it cuts the others at a dot."""
    return "." not in key.rpartition("/")[2]


def _warn_of(url: str, missing: Mapping[str, None]) -> None:
    if missing and url not in _warned:
        _warned.add(url)
        log.warn(
            f"{url}: {len(missing)} samples that it was written with are lost, the first is "
            f"{next(iter(missing))!r}; restore the shard, or read it by the source shards, which "
            "goes on behind damage"
        )
