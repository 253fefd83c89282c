"""Samples that lie as single files or members, listed in memory: what the sources `folder` and
`classes` share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vlp.config import Captions
from vlp.data import wrong_captions
from vlp.data.archives import Archive, Place, image_type
from vlp.data.listing import Named, settle
from vlp.data.rows import LABELS, labels_of
from vlp.data.sources import Source, captions_of
from vlp.data.trees import read_tree
from vlp.types import Sample


def open_tree(
    path: str, split: str, on_missing: str, captions: Captions, *, paired: bool
) -> Listed:
    """A tree of pictures without a table, which must be pairs, or must be classes; raises
    ValueError or OSError.
    """
    archive = Archive(path, split)
    tree = read_tree(archive, captions.lines)
    if tree.paired != paired:
        there = (
            "images with texts beside them; use {name: folder}"
            if tree.paired
            else (
                "one folder a class and no text beside an image; use {name: classes}, or name a table with captions: TABLE"
            )
        )
        raise ValueError(f"{archive.path} holds {there}")
    if tree.problems and on_missing == "fail":
        lines = "\n".join(tree.problems[:10])
        raise ValueError(
            f"{len(tree.problems)} images or folders cannot be used; on_missing: skip leaves them out\n{lines}"
        )
    passed_over = [f"left out {archive.left_out}"] if archive.left_out.counts else []
    notes = [f"{archive.path}: {note}" for note in tree.notes + passed_over]
    return Listed(
        archive, [(item, item.image) for item in tree.items], captions, tree.problems, notes
    )


class Listed(Source):
    """Random access to items of an archive; `named` pairs each with its stored name.

    `problems`: a line for each sample that is left out already; `notes`: what else is to be said at
    the start.
    """

    def __init__(
        self,
        archive: Archive,
        named: Sequence[Named],
        captions: Captions,
        problems: list[str],
        notes: Sequence[str] = (),
    ) -> None:
        named, clashes = settle(named, archive)
        records, odd, self._problems, digest = [], [], [*problems, *clashes], hashlib.sha256()
        self.labels = frozenset(LABELS)
        for item, name in named:
            texts = captions_of(tuple(item.captions), item.meta, captions)
            if not texts:
                self._problems.append(f"{archive.path}: {name!r} has no caption")
                continue
            records.append(json.dumps([name, archive.place(name), texts, item.meta]).encode())
            digest.update(
                json.dumps([name, texts, item.meta]).encode()
            )  # not the place: a data set may be moved
            self.note_wrong_captions(item.meta, texts)
            odd += [
                f"{archive.path}: {name!r}: {problem}"
                for problem in wrong_captions.problems(item.meta, texts)
            ]
            self.labels &= labels_of(item.meta)
        self.n_left_out = len(self._problems)
        n_silent = len(named) - len(records)
        if n_silent and captions.missing == "error":
            raise ValueError(
                f"{n_silent} of {len(named)} images in {archive.path} have no caption (the first: {self._problems[-n_silent]}); "
                "set captions.class_templates to make captions of class names, or captions.missing=drop to leave them out"
            )
        if not records:
            raise ValueError(
                f"{archive.path} holds no usable sample: {'; '.join(self._problems[:3]) or 'no rows'}"
            )
        self._problems += [*odd, *notes]
        self._digest = digest.hexdigest()
        # One block in shared memory instead of a million Python objects in every loader process.
        self._text = torch.frombuffer(
            bytearray(b"".join(records)), dtype=torch.uint8
        ).share_memory_()
        self._ends = torch.tensor([0, *map(len, records)]).cumsum(0).share_memory_()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Sample:
        name, place, captions, meta = self._record(i)
        return Sample(
            i,
            os.path.splitext(name)[0],
            Place(*place).read(),
            image_type(name),
            tuple(captions),
            meta,
        )

    def _record(self, i: int) -> tuple[str, list, list[str], dict[str, Any]]:
        return tuple(json.loads(self._text[self._ends[i] : self._ends[i + 1]].numpy().tobytes()))

    def n_captions(self) -> np.ndarray:
        return np.array([len(self._record(i)[2]) for i in range(len(self))], np.int64)

    def origins(self) -> np.ndarray:
        names = [self._record(i)[3].get("origin") for i in range(len(self))]
        return np.cumsum(
            [name is None or name != before for name, before in zip(names, [None, *names])]
        )

    def fingerprint(self) -> str:
        return self._digest

    def problems(self) -> list[str]:
        return self._problems
