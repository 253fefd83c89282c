"""A folder (or a tar) of images with their captions: in a table, or in texts beside the images.

    {name: folder, path: photos, captions: photos/captions.csv}
    {name: folder, path: photos}      # 00000/000000001.jpg with 000000001.txt or .json beside it, at any depth
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.sources._listed import Listed, open_tree
from vlp.data.tables import Columns, items


@dataclass(frozen=True)
class Options:
    """Where images and captions are, and which columns matter."""

    path: str  # folder or tar
    captions: str = ""  # .csv, .tsv, .jsonl, .json or .parquet; rows of one image are taken together. Empty: texts beside
    split: str = ""  # the sub-folder to take where the path holds splits (train, val, …)
    image_column: str = ""  # empty: image, file_name, filepath, filename or path
    caption_columns: list[str] = field(default_factory=list)  # empty: captions, caption, text, title or sentence
    class_column: str = ""  # empty: class
    where: dict[str, str] = field(default_factory=dict)  # only rows whose column has this value
    on_missing: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        of_tables = {"image_column", "caption_columns", "class_column", "where"}
        useless = sorted(name for name in of_tables if getattr(self, name))
        if useless and not self.captions:
            raise ValueError(f"{', '.join(useless)} choose from a table; name it with captions: TABLE")


def open(options: Options, captions: Captions) -> Listed:
    """Read the table and find its images, or read the texts beside them; raises ValueError or OSError."""
    if not options.captions:
        return open_tree(options.path, options.split, options.on_missing, captions, paired=True)
    archive = Archive(options.path, options.split)
    columns = Columns(options.image_column, tuple(options.caption_columns), options.class_column)
    found, _ = items(options.captions, columns, options.where)
    named = [(item, archive.find(item.image)) for item in found]
    missing = [
        f"{options.captions}:{item.row}: no image {item.image!r}: it {archive.why_not(item.image)}"
        for item, name in named
        if not name
    ]
    if missing and options.on_missing == "fail":
        lines = "\n".join(missing[:10])
        raise ValueError(
            f"{len(missing)} rows name images that are not there; on_missing: skip leaves them out\n{lines}"
        )
    return Listed(archive, [(item, name) for item, name in named if name], captions, missing)
