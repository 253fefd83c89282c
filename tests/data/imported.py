"""Prints what a loader process of a run has imported once it made a batch: python -m
tests.data.imported SHARDS.

A loader process runs this file, too, so that it imports nothing heavy by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


class Modules:
    """A data set whose items are the names of the modules that were imported to make one."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getitem__(self, index: int) -> Any:
        self.inner[index]
        return SimpleNamespace(modules=sorted(sys.modules)), None


def main(path: str) -> None:
    """Start the server as `vlp train` does, and print a loader process's modules as JSON."""
    from tests.data.material import data_of, loader_of
    from vlp.config import load
    from vlp.data import server
    from vlp.data.processes import Feed

    source = {"name": "shards", "path": path}
    server.start_for(load(DEMO, [f"data.sources=[{json.dumps(source)}]", "data.workers=1"]))
    feed = Feed(Modules(loader_of(data_of(source), 4)._steps), 0, n_workers=1)
    item = None
    while item is None:
        item = feed.poll()
    print(json.dumps(item[0].modules))


if __name__ == "__main__":
    main(sys.argv[1])
