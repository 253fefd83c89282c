"""Samples whose texts are kept in memory: what the sources of single files and of tables share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from vlp.data import wrong_captions
from vlp.data.rows import LABELS, labels_of
from vlp.data.sources import Source


class Record(NamedTuple):
    """One sample, of JSON values."""

    name: str
    place: Any  # where its picture lies, or the text in the place of one
    captions: Sequence[str]
    meta: dict[str, Any]
    roles: Sequence[str] = ()


class Recorded(Source):
    """A source of records; who inherits it calls `_keep` and makes a sample of a record."""

    def _keep(self, records: Sequence[Record], path: object) -> list[str]:
        """Take the samples over, in their order; returns what is odd and costs none of them."""
        odd: list[str] = []
        blocks: list[bytes] = []
        digest = hashlib.sha256()
        self.labels = frozenset(LABELS)
        for record in records:
            name, place, captions, meta, _ = record
            blocks.append(json.dumps(record).encode())
            # Without the place of a picture: a data set may be moved.
            content = [name, captions, meta]
            if isinstance(place, str):
                content.append(place)
            digest.update(json.dumps(content).encode())

            self.labels &= labels_of(meta)
            self.note_wrong_captions(meta, captions)
            for problem in wrong_captions.problems(meta, captions):
                odd.append(f"{path}: {name!r}: {problem}")
        self._digest = digest.hexdigest()

        # One block in shared memory instead of a million Python objects in every loader process.
        block = bytearray(b"".join(blocks))
        self._text = torch.frombuffer(block, dtype=torch.uint8).share_memory_()
        self._ends = torch.tensor([0, *map(len, blocks)]).cumsum(0).share_memory_()
        return odd

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _record(self, i: int) -> Record:
        """Record i, whose tuples have become lists."""
        start, end = self._ends[i : i + 2].tolist()
        block = self._text[start:end].numpy()
        return Record(*json.loads(block.tobytes()))

    def n_captions(self) -> np.ndarray:
        counts = [len(self._record(i).captions) for i in range(len(self))]
        return np.array(counts, np.int64)

    def origins(self) -> np.ndarray:
        begins = []
        origin_before = None
        for i in range(len(self)):
            origin = self._record(i).meta.get("origin")
            begins.append(origin is None or origin != origin_before)
            origin_before = origin

        return np.cumsum(begins)

    def fingerprint(self) -> str:
        return self._digest
