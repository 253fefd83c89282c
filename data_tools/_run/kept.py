"""Values that are dear to compute, by hash, kept in a file batch by batch.

FILE.jsonl has a line a value: {"hash": …, "value": …}. A killed call reads it and computes only the
batches that are missing. A batch is made of the same hashes however often a call is stopped,
because what a model computes depends, in its last bits, on what stands beside it. So a call that
goes on gets the same values.

Where the file lies in a store, which cannot append, all of it is put there from time to time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlp.data.stored import publish_soon
from vlp.files import naming

Compute = Callable[[list[str]], list[Any]]  # the values of a batch of hashes


class Kept:
    """The values of one file (None: kept in memory only)."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.values = read_kept(path) if path is not None and path.exists() else {}

    def complete(self, hashes: list[str], batch: int, compute: Compute) -> None:
        """Let `values` have all of these, computed in batches in this order."""
        for i in range(0, len(hashes), batch):
            of_batch = hashes[i : i + batch]
            if all(key in self.values for key in of_batch):
                continue

            # The first value of a hash stays: what was made from it is written already.
            computed = dict(zip(of_batch, compute(of_batch)))
            new = {key: computed[key] for key in of_batch if key not in self.values}
            self.values |= new
            if self.path is not None:
                lines = [json.dumps({"hash": key, "value": new[key]}) for key in new]
                _append(self.path, "".join(line + "\n" for line in lines))
                publish_soon(self.path)


def read_kept(path: Path) -> dict[str, Any]:
    """Hash → value of a file; a line that a killed call left unfinished is passed over."""
    values: dict[str, Any] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"hash", "value"} <= line.keys():
                values.setdefault(line["hash"], line["value"])
    return values


def _append(path: Path, text: str) -> None:
    """Add whole lines to a file, and wait for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "ab+") as file:
        # What a killed call left of a line must not swallow the next.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(text.encode(errors="surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
