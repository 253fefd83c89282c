"""What a node fetches of remote shards: which, how far ahead, how many at once."""

from __future__ import annotations

import numpy as np

from vlp import dist
from vlp.data.mix import Mixture


def prepare(mixture: Mixture, ids: np.ndarray) -> None:
    """Let the sources fetch what these samples need, without waiting."""
    for s, source in enumerate(mixture.sources):
        if source.window:
            first, end = mixture.firsts[s : s + 2]
            in_source = (ids >= first) & (ids < end)
            source.prepare(ids[in_source] - first)


def steps_ahead(mixture: Mixture, size: int) -> int:
    """How many steps of `size` rows lie between a sample and the one a window later; 0 where
    nothing is fetched.
    """
    # A window's units follow one another, so that many rows pass until the next window.
    rows_of_windows = []
    for source, units in zip(mixture.sources, mixture.units):
        if source.window:
            n_shards = mixture.lanes * mixture.width(source.window)
            rows_of_windows.append(n_shards * len(units) * mixture.together / len(source.runs))
    if not rows_of_windows:
        return 0
    return max(1, int(max(rows_of_windows) / size))


def traffic(mixture: Mixture) -> tuple[int, int]:
    """Bytes fetched, and bytes of samples read, since the last call, by this process."""
    of_sources = [source.traffic() for source in mixture.sources if source.window]
    return sum(fetched for fetched, _ in of_sources), sum(used for _, used in of_sources)


def ranks_here(rank: int, world: int) -> range:
    """The ranks of this machine."""
    n_ranks = min(world, dist.local_world_size())
    first = rank // n_ranks * n_ranks
    return range(first, first + n_ranks)


def check_room(mixture: Mixture, rank: int, world: int) -> None:
    """ValueError where the shards that this machine reads at once do not fit into its cache."""
    ranks = ranks_here(rank, world)
    first_lane = ranks.start * mixture.lanes // world
    end_lane = -(-ranks.stop * mixture.lanes // world)
    for source in mixture.sources:
        source.check_room((end_lane - first_lane) * mixture.width(source.window))


def shared_shards(mixture: Mixture, batch: int, n_nodes: int) -> str:
    """Why some shards are fetched by several nodes, and what a new run should set; empty where each
    node has shards of its own.
    """
    is_remote = any(source.window for source in mixture.sources)
    n_draws = batch // mixture.together
    if not is_remote or n_nodes == 1 or not mixture.shuffle:
        return ""
    if mixture.lanes % n_nodes == 0 and n_draws % mixture.lanes == 0:
        return ""

    advice = f"a multiple of {n_nodes} that divides a batch's {n_draws:,} draws"
    for lanes in range(-(-mixture.lanes // n_nodes) * n_nodes, 0, -n_nodes):
        if n_draws % lanes == 0:
            advice = str(lanes)
            break
    return (
        f"data.lanes is {mixture.lanes} on {n_nodes} nodes, for batches of {n_draws:,}: several "
        f"nodes fetch the same shards; a new run fetches each once with data.lanes={advice}"
    )
