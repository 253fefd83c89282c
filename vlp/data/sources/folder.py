"""A folder (or a tar) of images with a caption table: `{name: folder, path: photos, captions: photos/captions.csv}`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.sources._listed import Listed
from vlp.data.tables import Columns, items


@dataclass(frozen=True)
class Options:
    """Where images and captions are, and which columns matter."""

    path: str  # folder or tar
    captions: str  # .csv, .tsv, .jsonl, .json or .parquet; rows of one image are taken together
    image_column: str = ""  # empty: image, file_name, filepath, filename or path
    caption_columns: list[str] = field(default_factory=list)  # empty: captions, caption, text, title or sentence
    class_column: str = ""  # empty: class
    where: dict[str, str] = field(default_factory=dict)  # only rows whose column has this value
    on_missing: Literal["fail", "skip"] = "fail"  # rows whose image is not there: refuse to start, or leave them out


def open(options: Options, captions: Captions) -> Listed:
    """Read the table and find its images; raises ValueError or OSError."""
    archive = Archive(options.path)
    columns = Columns(options.image_column, tuple(options.caption_columns), options.class_column)
    found, _ = items(options.captions, columns, options.where)
    named = [(item, archive.find(item.image)) for item in found]
    missing = [f"{options.captions}:{item.row}: no image {item.image!r} in {options.path}" for item, name in named if not name]
    if missing and options.on_missing == "fail":
        lines = "\n".join(missing[:10])
        raise ValueError(f"{len(missing)} rows name images that are not there; on_missing: skip leaves them out\n{lines}")
    return Listed(archive, [(item, name) for item, name in named if name], captions, missing)
