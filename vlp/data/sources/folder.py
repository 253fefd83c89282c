"""A folder (or a tar) of images with a caption table.

    {name: folder, path: photos, captions: photos/captions.csv}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.sources._listed import Listed
from vlp.data.tables import TableOptions, items


@dataclass(frozen=True)
class Options(TableOptions):
    """Where images and captions are; how the table is read."""

    path: str  # folder or tar
    captions: str  # .csv, .tsv, .txt, .token, .jsonl, .json or .parquet; rows of one image are taken together
    on_missing: Literal["fail", "skip"] = "fail"  # rows that cannot be used: refuse, or leave out


def open(options: Options, captions: Captions) -> Listed:
    """Read the table and find its images; raises ValueError or OSError."""
    archive = Archive(options.path)
    listing = items(options.captions, options)
    named = [(item, archive.find(item.image)) for item in listing.items]
    missing = [
        f"{listing.place(item)}: no image {item.image!r} in {options.path}"
        for item, name in named
        if not name
    ]
    problems = listing.problems + missing
    if problems and options.on_missing == "fail":
        lines = "\n".join(problems[:10])
        raise ValueError(
            f"{len(problems)} rows cannot be used, {len(missing)} of them name images that are not there; "
            f"on_missing: skip leaves them out\n{lines}"
        )
    return Listed(archive, [(item, name) for item, name in named if name], captions, problems)
