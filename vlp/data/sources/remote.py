"""Shards elsewhere: `{name: remote, path: "s3://bucket/train/{00000..04095}.tar"}`, any address
that fsspec knows.

Shards are fetched whole and once, ahead of their use, into a bounded cache (`VLP_CACHE`). The order
keeps to a window of shards at a time: shards are permuted each epoch, samples within their window.
With as many lanes as nodes, or a multiple (`data.lanes`), a node fetches its own shards only. A
store that gives nothing is waited for `patience_s`; then the run ends, and goes on later.

The index comes from an `_index.bin` beside the shards; where there is none, every shard is fetched
once to make it.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlp import log
from vlp.config import Captions, Members
from vlp.data import looks
from vlp.data.ahead import Ahead
from vlp.data.asking import cause_of, is_full, is_refused
from vlp.data.captions import Texts
from vlp.data.fetch import Cache, version_of
from vlp.data.looks import Listed
from vlp.data.sources import Contents, Source, StoreAway
from vlp.data.sources._remote_index import index_of, list_shards
from vlp.data.sources._remote_members import members_of
from vlp.data.sources.shards import Shards
from vlp.privacy import address
from vlp.types import Sample

_REST_S = 300.0  # before a shard that failed all tries is asked for again


@dataclass(frozen=True)
class Options(Texts):
    """Where the shards are, how much of them is held here, and which texts are captions."""

    path: str  # addresses with braces, several joined by ::, or a folder's address ending in /
    # Shards whose samples are shuffled together: of all lanes, of which each has one at least.
    window: int = 8
    cache_gb: float = 50.0  # of local disk; must hold three windows of this node's lanes
    fetchers: int = 4  # shards that a loader process fetches at once
    # http and s3: a connection silent for so long is given up, and the shard tried again.
    stall_s: float = 60.0
    # A store that gives no shard for so long ends the run. Below train.timeout_minutes, or the
    # other ranks give up first.
    patience_s: float = 900.0
    # fsspec's options for this kind of address.
    storage: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        spans = (self.cache_gb, self.stall_s, self.patience_s)
        if min(self.window, self.fetchers) < 1 or min(spans) <= 0:
            raise ValueError(
                f"window is {self.window}, fetchers {self.fetchers}, cache_gb {self.cache_gb}, "
                f"stall_s {self.stall_s}, patience_s {self.patience_s}; "
                "expected at least 1, and more than 0"
            )


def open(options: Options, captions: Captions) -> Remote:
    """List and index the shards; raises ValueError or OSError."""
    cache = Cache(int(options.cache_gb * 1e9), _storage(options))
    listed = looks.listed(options, listing)
    cache = replace(cache, versions={address(shard.url): shard.version for shard in listed})

    # Copies of what has changed go first: an index made here is of the old content.
    changed = {shard.url for shard in listed if cache.drop_if_changed(*shard)}
    urls = [shard.url for shard in listed]
    sizes = [shard.size for shard in listed]
    shards = index_of(urls, sizes, changed, cache)

    of_shards = Shards(urls, shards, captions, options)
    return Remote(of_shards, cache, options, max(sizes), frozenset(changed))


def listing(options: Options) -> list[Listed]:
    """What the store says of each shard that the path names; raises ValueError or OSError."""
    urls, infos = list_shards(options.path, _storage(options))
    return [Listed(url, int(info["size"]), version_of(info)) for url, info in zip(urls, infos)]


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

    def __init__(
        self,
        shards: Shards,
        cache: Cache,
        options: Options,
        largest_bytes: int,
        changed: frozenset[str],  # addresses of shards that changed since they were fetched here
    ) -> None:
        self.shards = shards
        self._changed = changed
        self.cache = cache
        self.window = options.window
        self.patience_s = options.patience_s
        self.runs = shards.counts()
        self._largest_bytes = largest_bytes

        # What the samples offer.
        self.n_left_out = shards.n_left_out
        self.labels = shards.labels
        self.pictured = shards.pictured
        self.n_negatives = shards.n_negatives
        self.n_counterfactuals = shards.n_counterfactuals

        self._ahead = Ahead(cache.fetch_ahead, options.fetchers)
        self._failed: dict[str, tuple[float, str]] = {}  # when and why a shard could not be had
        self._n_used_told = 0  # bytes of samples, as `traffic` told

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_n_used_told": 0}  # each process counts by itself

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Sample:
        return self.shards.sample(i, self._copy(self._url_of(i)))

    def find_members(self, wanted: Mapping[str, Members]) -> None:
        of_shards = members_of(self.shards.paths, self.shards.indexed(), self._changed, self.cache)
        self.shards.use_members(wanted, of_shards)
        self.members = self.shards.members

    def check_room(self, n_shards: int) -> None:
        # This window, the next, and the one that slower processes still read.
        n_held = min(3 * n_shards, len(self.shards.paths))
        needed = n_held * self._largest_bytes
        if needed > self.cache.limit_bytes:
            raise ValueError(
                f"cache_gb is {self.cache.limit_bytes / 1e9:g}, but three windows of {n_shards} "
                f"shards need {needed / 1e9:.2g}; set it higher, or window or data.lanes lower"
            )

    def is_lost(self, i: int) -> bool:
        return self._resting(self._url_of(i)) is not None

    def traffic(self) -> tuple[int, int]:
        used = self.shards.n_bytes_read - self._n_used_told
        self._n_used_told = self.shards.n_bytes_read
        return self.cache.traffic.take(), used

    def prepare(self, ids: np.ndarray) -> None:
        """Begin to fetch the shards of these samples in the background. What fails is tried again
        when it is read.
        """
        for shard in np.unique(self.shards.shards_of(ids)).tolist():
            url = self.shards.paths[shard]
            if not self.cache.at_hand(url) and self._resting(url) is None:
                self._ahead.ask(url)

    def _url_of(self, i: int) -> str:
        return self.shards.paths[self.shards.shard_of(i)]

    def _resting(self, url: str) -> str | None:
        """Why a shard is not asked for just now: it failed all tries lately, and each of its
        samples would wait for all of them anew. None for all others.
        """
        since, reason = self._failed.get(url, (-math.inf, ""))
        return reason if time.monotonic() < since + _REST_S else None

    def _copy(self, url: str) -> str:
        """The local copy of a shard. OSError where it alone cannot be had, StoreAway where nothing
        can.
        """
        reason = self._resting(url)
        if reason is not None:
            raise OSError(reason)

        started = time.monotonic()
        told = others_came = False
        while True:
            try:
                return self.cache.get(url, until=started + self.patience_s)
            except OSError as error:
                # Once more where the store gives others: it may have come back just now.
                is_final = _is_final(error)
                other_comes = not is_final and self._gives_another(url)
                if is_final or (other_comes and others_came):
                    self._failed[url] = (time.monotonic(), str(error))
                    raise
                others_came = other_comes
                if not other_comes:
                    self._check_patience(url, error, time.monotonic() - started)
                    if not told:
                        log.warn(
                            f"{_store(url)} gives no shard; it is waited for up to "
                            f"{self.patience_s:,.0f} s: {error}"
                        )
                        told = True

    def _gives_another(self, url: str) -> bool:
        """Whether the store gives another shard than this one."""
        place = self.shards.paths.index(url)
        other = self.shards.paths[place - 1]
        return other != url and self.cache.answers(other)

    def _check_patience(self, url: str, error: OSError, waited_s: float) -> None:
        """Raise StoreAway where waiting is over, or would not help, for a store that gives
        nothing.
        """
        if is_refused(cause_of(error), url):
            raise StoreAway(
                f"{_store(url)} refuses what it gave before: {error}. Renew the credentials, the "
                "signature in the addresses, or what `storage` names"
            ) from error
        if waited_s >= self.patience_s:
            raise StoreAway(
                f"{_store(url)} gave no shard for {waited_s:,.0f} s (patience_s is "
                f"{self.patience_s:g}): {error}"
            ) from error

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


def _store(url: str) -> str:
    """The folder of a shard, without what is secret."""
    return address(url).rpartition("/")[0]


def _is_final(error: OSError) -> bool:
    """Whether a shard is not there, or this disk is full: waiting helps neither."""
    return isinstance(error, FileNotFoundError) or is_full(cause_of(error))
