"""Evaluation sets in folders: images with texts beside them, or a folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vlp.data.archives import Archive
from vlp.data.trees import read_tree, splits_in
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import DataError, picture_of


def from_tree(
    root: Path, split: str, missing: str, archive: Archive, lines: Literal["one", "each"]
) -> Source:
    """Images with texts beside them, or one folder a class."""
    if not archive.names:
        left_out = f"; found {archive.left_out}" if archive.left_out.counts else ""
        raise DataError(
            f"{archive.path} is none of the known layouts: no {split}/nshards.txt, no .tar, "
            "no .parquet, no images with a .txt or .json beside each, "
            f"no folders of images (one a class){left_out}"
        )

    # Splits would be taken for classes.
    other_splits = splits_in(archive)
    if other_splits:
        raise DataError(
            f"{root} has no split {split!r}, only {', '.join(other_splits)}; pass split=…"
        )

    try:
        tree = read_tree(archive, lines)
    except ValueError as error:
        raise DataError(str(error)) from error
    if tree.problems and missing != "skip":
        some = "".join(f"\n  {problem}" for problem in tree.problems[:10])
        unread = f" (not read: {archive.left_out})" if archive.left_out.counts else ""
        raise DataError(
            f"{len(tree.problems)} images or folders of {archive.path} cannot be used{unread}:"
            f"{some}\nmend them, or pass missing=skip to evaluate without them "
            "(the score is then not comparable)"
        )

    # With texts beside the images the class is written there; without, the folder is the class.
    # Folders of one class, such as "cat" and "cat ", have the name of the first.
    folders: dict[str, str] = {}
    records = []
    for item in tree.items:
        if tree.paired:
            label = item.meta.get("class", item.meta.get("cls"))
        else:
            label = folders.setdefault(item.meta["class"], item.image.split("/")[0])
        picture = picture_of(archive, item.image)
        records.append(Record(picture, tuple(item.captions), label, item.meta))
    return Source(str(root), records, skipped=tree.problems)
