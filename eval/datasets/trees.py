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
        found = f"; found {archive.left_out}" if archive.left_out.counts else ""
        raise DataError(
            f"{archive.path} is none of the known layouts: no {split}/nshards.txt, no .tar, no .parquet, no images with a "
            f".txt or .json beside each, no folders of images (one a class){found}"
        )
    there = splits_in(archive)
    if there:  # else they would be taken for classes
        raise DataError(f"{root} has no split {split!r}, only {', '.join(there)}; pass split=…")
    try:
        tree = read_tree(archive, lines)
    except ValueError as error:
        raise DataError(str(error)) from error
    if tree.problems and missing != "skip":
        some = "".join(f"\n  {problem}" for problem in tree.problems[:10])
        advice = "mend them, or pass missing=skip to evaluate without them (the score is then not comparable)"
        raise DataError(
            f"{len(tree.problems)} images or folders of {archive.path} cannot be used:{some}\n{advice}"
        )
    records = []
    for item in tree.items:
        label = (
            item.meta.get("class", item.meta.get("cls"))
            if tree.paired
            else item.image.split("/")[0]
        )
        records.append(
            Record(picture_of(archive, item.image), tuple(item.captions), label, item.meta)
        )
    return Source(str(root), records, skipped=tree.problems)
