"""Shards elsewhere: `{name: remote, path: "s3://bucket/train/{00000..04095}.tar"}`, any address
that fsspec knows.

Shards are fetched whole and once, ahead of their use, into a bounded cache (`VLP_CACHE`). The order
keeps to a window of shards at a time: shards are permuted each epoch, samples within their window.
The index comes from an `_index.bin` beside the shards; where there is none, every shard is fetched
once to make it.
"""

from __future__ import annotations

import importlib.util
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlp.config import Captions
from vlp.data.captions import Texts
from vlp.data.fetch import Cache, version_of
from vlp.data.sources import Contents, Source
from vlp.data.sources._remote_index import index_of, list_shards
from vlp.data.sources.shards import Shards
from vlp.privacy import address
from vlp.types import Sample

_REST_S = 300.0  # before a shard that failed all tries is asked for again


@dataclass(frozen=True)
class Options(Texts):
    """Where the shards are, how much of them is held here, and which texts are captions."""

    path: str  # addresses with braces, several joined by ::, or a folder's address ending in /
    window: int = 8  # shards whose samples are shuffled together
    cache_gb: float = 50.0  # of local disk; must hold three windows
    # http and s3: a connection silent for so long is given up, and the shard tried again.
    stall_s: float = 60.0
    # fsspec's options for this kind of address.
    storage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or min(self.cache_gb, self.stall_s) <= 0:
            raise ValueError(
                f"window is {self.window}, cache_gb {self.cache_gb}, stall_s {self.stall_s}; "
                "expected at least 1, and more than 0"
            )


def open(options: Options, captions: Captions) -> Remote:
    """List and index the shards; raises ValueError or OSError."""
    cache = Cache(int(options.cache_gb * 1e9), _storage(options))
    urls, infos = list_shards(options.path, cache.storage)
    sizes = [int(info["size"]) for info in infos]
    versions = [version_of(info) for info in infos]
    cache = replace(cache, versions=dict(zip(map(address, urls), versions)))

    # Copies of what has changed go first: an index made here is of the old content.
    changed = set()
    for url, size, version in zip(urls, sizes, versions):
        if cache.drop_if_changed(url, size, version):
            changed.add(url)
    shards = index_of(urls, sizes, changed, cache)

    # This window, the next, and the one that slower processes still read.
    needed = 3 * options.window * max(sizes)
    if needed > cache.limit_bytes:
        raise ValueError(
            f"cache_gb is {options.cache_gb:g}, but three windows of {options.window} shards need "
            f"{needed / 1e9:.2g}"
        )
    return Remote(Shards(urls, shards, captions, options), cache, options.window)


def _storage(options: Options) -> dict[str, Any]:
    """fsspec's options, with the patience of `stall_s` instead of a limit on the whole transfer or
    none.
    """
    storage, patience = options.storage, options.stall_s

    # Options of the user go before these.
    if options.path.startswith("s3://"):
        limits = {"connect_timeout": patience, "read_timeout": patience}
        return {**storage, "config_kwargs": {**limits, **storage.get("config_kwargs", {})}}

    is_http = options.path.startswith(("http://", "https://"))
    if is_http and importlib.util.find_spec("aiohttp"):  # else fsspec asks for it
        from aiohttp import ClientTimeout

        limit = ClientTimeout(total=None, sock_connect=patience, sock_read=patience)
        return {**storage, "client_kwargs": {"timeout": limit, **storage.get("client_kwargs", {})}}
    return storage


class Remote(Source):
    """Samples of remote shards through the cache."""

    def __init__(self, shards: Shards, cache: Cache, window: int) -> None:
        self.shards = shards
        self.cache = cache
        self.window = window
        self.runs = shards.counts()

        # What the samples offer.
        self.n_left_out = shards.n_left_out
        self.labels = shards.labels
        self.pictured = shards.pictured
        self.n_negatives = shards.n_negatives
        self.n_counterfactuals = shards.n_counterfactuals

        self._fetcher: ThreadPoolExecutor | None = None
        self._asked: dict[str, None] = {}  # lately asked for, in order
        self._failed: dict[str, tuple[float, str]] = {}  # when and why a shard could not be had

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fetcher": None}  # threads stay behind

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Sample:
        url = self.shards.paths[self.shards.shard_of(i)]
        return self.shards.sample(i, self._copy(url))

    def _copy(self, url: str) -> str:
        """The local copy of a shard. One that failed rests, or each of its samples would wait for
        all tries anew.
        """
        since, reason = self._failed.get(url, (-math.inf, ""))
        if time.monotonic() < since + _REST_S:
            raise OSError(reason)

        try:
            return self.cache.get(url)
        except OSError as error:
            self._failed[url] = (time.monotonic(), str(error))
            raise

    def prepare(self, ids: np.ndarray) -> None:
        """Begin to fetch the shards of these samples in the background. What fails is tried again
        when it is read.
        """
        self._fetcher = self._fetcher or ThreadPoolExecutor(1, "fetch")
        for shard in np.unique(self.shards.shards_of(ids)).tolist():
            url = self.shards.paths[shard]
            if url not in self._asked:
                self._asked[url] = None
                self._fetcher.submit(self.cache.get, url)

        # Old addresses are forgotten, so that a shard is fetched again in a later epoch.
        while len(self._asked) > 4 * self.window:
            self._asked.pop(next(iter(self._asked)))

    def n_captions(self) -> np.ndarray:
        return self.shards.n_captions()

    def origins(self) -> np.ndarray:
        return self.shards.origins()

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def earlier_fingerprint(self) -> str:
        return self.shards.earlier_fingerprint()

    def contents(self) -> Contents:
        return self.shards.contents()

    def problems(self) -> list[str]:
        return self.shards.problems()
