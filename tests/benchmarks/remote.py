"""What nodes fetch of remote shards: bytes that the store sent for each byte of the samples read.

    python tests/benchmarks/remote.py [--nodes 1 2 4 8] [--shards 256] [--publish]

A store on loopback serves the shards over http. Each node is a loader of one rank with a cache of
its own, which holds just the three windows that are asked for; all take the steps of one epoch in
turn. The store counts what it sends. With one lane rows of a batch come from one window for all
ranks, as before there were lanes; with eight each node takes its share of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, the folder of this file stands first on the path.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks import report
from tests.benchmarks.order import slope
from tests.data.loopback_store import Store, store
from vlp.config import Data
from vlp.data.format import ShardWriter
from vlp.data.loader import Loader
from vlp.schema import parse
from vlp.types import ImageSpec, TextSpec

SAMPLES_A_SHARD = 64
PICTURE_BYTES = 12_000
WINDOW = 8
BATCH = 64
PNG = b"\x89PNG\r\n\x1a\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--shards", type=int, default=256)
    report.add_arguments(parser)
    args = parser.parse_args()

    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        root = Path(folder) / "store"
        write(root, args.shards)
        for lanes in (1, WINDOW):
            for nodes in args.nodes:
                with store(root) as server, caches(Path(folder), nodes) as places:
                    rows.append(measured(server, places, lanes, args.shards))
                print(rows[-1], file=sys.stderr)

    by_lanes = {lanes: [row for row in rows if row["lanes"] == lanes] for lanes in (1, WINDOW)}
    column = "fetched ÷ used"
    before, after = (slope(by_lanes[lanes], "nodes", column) for lanes in (1, WINDOW))
    notes = (
        f"One epoch of {args.shards:,} shards of {SAMPLES_A_SHARD} samples, {WINDOW} shards at "
        f"once, batches of {BATCH}, over http on loopback, counted by the server. Log-log slope of "
        f"{column} over nodes: {before:.2f} with one lane, {after:.2f} with {WINDOW}. Above 1 are "
        "the shards at the borders of two nodes' lanes, one a node, the first of the next epoch, "
        "fetched ahead, and the end of each tar."
    )
    report.publish("remote", "Remote shards: what nodes fetch", rows, args, notes)


def write(root: Path, n_shards: int) -> None:
    """Shards of pictures that nobody decodes."""
    noise = np.random.default_rng(0)
    with ShardWriter(root, SAMPLES_A_SHARD) as writer:
        for i in range(n_shards * SAMPLES_A_SHARD):
            writer.add(None, PNG + noise.bytes(PICTURE_BYTES), "png", [f"caption {i}"], {})


@contextmanager
def caches(folder: Path, nodes: int) -> Iterator[list[Path]]:
    """A folder for the cache of each node, removed afterwards."""
    # What is fetched for the next epoch may still be written meanwhile.
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as name:
        yield [Path(name) / str(node) for node in range(nodes)]


def measured(server: Store, places: list[Path], lanes: int, n_shards: int) -> dict[str, Any]:
    """The line of an epoch of as many nodes as there are places for caches."""
    nodes = len(places)
    shard_bytes = max(path.stat().st_size for path in server.root.glob("*.tar"))
    at_once = WINDOW if lanes == 1 else WINDOW // min(nodes, lanes)
    source = {
        "name": "remote",
        "path": f"{server.url}/{{00000..{n_shards - 1:05d}}}.tar",
        "window": WINDOW,
        "cache_gb": 3 * at_once * shard_bytes / 1e9,
    }

    loaders = []
    for node, place in enumerate(places):
        os.environ["VLP_CACHE"] = str(place)
        data = parse(Data, {"sources": [source], "lanes": lanes, "workers": 0})
        loaders.append(loader_of(data, node, nodes))

    most_bytes = 0
    for _ in range(loaders[0].steps_per_epoch):
        for loader in loaders:
            next(loader)
        most_bytes = max(most_bytes, *map(held_bytes, places))

    sent = sum(n for name, n in server.n_sent.items() if name.endswith(".tar"))
    used = sum(float(loader.traffic()["used_bytes"]) for loader in loaders)
    assert not any(loader.bad for loader in loaders)
    return {
        "lanes": lanes,
        "nodes": nodes,
        "sent by the store, MB": sent / 1e6,
        "samples read, MB": used / 1e6,
        "fetched ÷ used": sent / used,
        "most in a node's cache, shards": round(most_bytes / shard_bytes),
    }


def held_bytes(place: Path) -> int:
    """Bytes of the copies in a cache."""
    n_bytes = 0
    for copy in place.rglob("*.tar"):
        with suppress(FileNotFoundError):  # it made room meanwhile
            n_bytes += copy.stat().st_size
    return n_bytes


def loader_of(data: Data, node: int, nodes: int) -> Loader:
    """The loader of a node, which reads samples and decodes none."""
    image, text = ImageSpec((32, 32)), TextSpec("clip", 16)
    return Loader(data, image, text, batch=BATCH, seed=0, rank=node, world=nodes, pixels=False)


if __name__ == "__main__":
    main()
