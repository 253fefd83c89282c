"""Samples that lie as single files or members, listed in memory: what the sources `folder` and
`classes` share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from vlp.config import Captions
from vlp.data.archives import Archive, Place, image_type
from vlp.data.listing import Named, settle
from vlp.data.sources import captions_of
from vlp.data.sources._recorded import Record, Recorded
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

    # The other kind would train, on the wrong captions.
    if tree.paired and not paired:
        raise ValueError(
            f"{archive.path} holds images with texts beside them; use {{name: folder}}"
        )
    if paired and not tree.paired:
        raise ValueError(
            f"{archive.path} holds one folder a class and no text beside an image; "
            "use {name: classes}, or name a table with captions: TABLE"
        )

    if tree.problems and on_missing == "fail":
        lines = "\n".join(tree.problems[:10])
        unread = f"; not read: {archive.left_out}" if archive.left_out.counts else ""
        raise ValueError(
            f"{len(tree.problems)} images or folders cannot be used{unread}; "
            f"on_missing: skip leaves them out\n{lines}"
        )

    notes = [f"{archive.path}: {note}" for note in tree.notes]
    if archive.left_out.counts:
        notes.append(f"{archive.path}: left out {archive.left_out}")
    named = [(item, item.image) for item in tree.items]
    return Listed(archive, named, captions, tree.problems, notes)


class Listed(Recorded):
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
        records: list[Record] = []
        silent: list[str] = []  # samples without a caption
        for item, name in named:
            texts = captions_of(tuple(item.captions), item.meta, captions)
            if not texts:
                silent.append(f"{archive.path}: {name!r} has no caption")
                continue

            roles = [captions.roles[place] for place in item.columns] if captions.roles else []
            records.append(Record(name, archive.place(name), texts, item.meta, roles))

        # Refused only after all have been looked at, so that the error counts them.
        left_out = [*problems, *clashes, *silent]
        if silent and captions.missing == "error":
            raise ValueError(
                f"{len(silent)} of {len(named)} images in {archive.path} have no caption "
                f"(the first: {silent[0]}); set captions.class_templates to make captions of class "
                "names, or captions.missing=drop to leave them out"
            )
        if not records:
            reasons = "; ".join(left_out[:3]) or "no rows"
            raise ValueError(f"{archive.path} holds no usable sample: {reasons}")

        self.n_left_out = len(left_out)
        odd = self._keep(records, archive.path)
        self._problems = [*left_out, *odd, *notes]

    def __getitem__(self, i: int) -> Sample:
        name, place, captions, meta, roles = self._record(i)
        key, _ = os.path.splitext(name)
        image = Place(*place).read()
        return Sample(i, key, image, image_type(name), tuple(captions), meta, roles=tuple(roles))

    def problems(self) -> list[str]:
        return self._problems
