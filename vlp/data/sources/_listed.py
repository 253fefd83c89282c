"""Samples that lie as single files or members, listed in memory: what the sources `folder` and `classes` share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlp.config import Captions
from vlp.data.archives import Archive, Place, image_type
from vlp.data.rows import LABELS, labels_of
from vlp.data.sources import Source, captions_of, text_list
from vlp.data.tables import Item
from vlp.types import Sample


class Listed(Source):
    """Random access to items of an archive; `named` pairs each with its stored name."""

    def __init__(self, archive: Archive, named: Sequence[tuple[Item, str]], captions: Captions, problems: list[str]) -> None:
        records, self._problems, digest = [], list(problems), hashlib.sha256()
        self.n_negatives = self.n_counterfactuals = 0
        self.labels = frozenset(LABELS)
        for item, name in named:
            texts = captions_of(tuple(item.captions), item.meta, captions)
            if not texts:
                self._problems.append(f"{archive.path}: {name!r} has no caption")
                continue
            records.append(json.dumps([name, archive.place(name), texts, item.meta]).encode())
            digest.update(json.dumps([name, texts, item.meta]).encode())  # not the place: a data set may be moved
            self.n_negatives = max(self.n_negatives, len(text_list(item.meta, "negatives")))
            self.n_counterfactuals = max(self.n_counterfactuals, len(text_list(item.meta, "counterfactuals")))
            self.labels &= labels_of(item.meta)
        self.n_left_out = len(self._problems)
        n_silent = len(named) - len(records)
        if n_silent and captions.missing == "error":
            raise ValueError(
                f"{n_silent} of {len(named)} images in {archive.path} have no caption (the first: {self._problems[-n_silent]}); "
                "set captions.class_templates to make captions of class names, or captions.missing=drop to leave them out"
            )
        if not records:
            raise ValueError(f"{archive.path} holds no usable sample: {'; '.join(self._problems[:3]) or 'no rows'}")
        self._digest = digest.hexdigest()
        # One block in shared memory instead of a million Python objects in every loader process.
        self._text = torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8).share_memory_()
        self._ends = torch.tensor([0, *map(len, records)]).cumsum(0).share_memory_()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Sample:
        name, place, captions, meta = self._record(i)
        return Sample(i, os.path.splitext(name)[0], Place(*place).read(), image_type(name), tuple(captions), meta)

    def _record(self, i: int) -> tuple[str, list, list[str], dict[str, Any]]:
        return tuple(json.loads(self._text[self._ends[i] : self._ends[i + 1]].numpy().tobytes()))

    def n_captions(self) -> np.ndarray:
        return np.array([len(self._record(i)[2]) for i in range(len(self))], np.int64)

    def origins(self) -> np.ndarray:
        names = [self._record(i)[3].get("origin") for i in range(len(self))]
        return np.cumsum([name is None or name != before for name, before in zip(names, [None, *names])])

    def fingerprint(self) -> str:
        return self._digest

    def problems(self) -> list[str]:
        return self._problems
