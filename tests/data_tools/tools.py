"""Calling a data tool like the command line does, and reading back what it wrote."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

from vlp.data_tools._run.shards import samples

CAPTIONS = [
    ["A red car next to a blue truck", "two vehicles on a road"],
    ["Three black dogs sit under a large table", "three dogs"],
    ["hm"],
    ["a man often attends to ten horses", "a man and horses"],
    ["two cats and four birds"],
    ["An elephant"],
]


def call(tool: ModuleType, *options: Any) -> int:
    parser = argparse.ArgumentParser()
    tool.arguments(parser)
    # Beside the options stands what no process can be sent.
    parser.set_defaults(parser=parser, run=lambda args: tool.run(args))
    return tool.run(parser.parse_args([str(option) for option in options]))


def read(folder: Path) -> dict[str, Any]:
    return {s.key: s for path in sorted(folder.glob("*.tar")) for s in samples(path, Counter())}
