"""A folder (or a tar) of images with their captions: in a table, or in texts beside the images.

{name: folder, path: photos, captions: photos/captions.csv}
{name: folder, path: photos}

The second finds 00000/000000001.jpg with 000000001.txt or .json beside it, at any depth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.listing import Named
from vlp.data.sources import check_roles
from vlp.data.sources._listed import Listed, open_tree
from vlp.data.tables import TableOptions, items
from vlp.data.trees import refuse_without_images


@dataclass(frozen=True)
class Options(TableOptions):
    """Where images and captions are; how the table is read."""

    path: str  # folder or tar
    # .csv, .tsv, .txt, .token, .jsonl, .json or .parquet; rows of one image are taken together.
    captions: str = ""  # empty: texts beside the images
    # The sub-folder to take where the path holds splits (train, val, …).
    split: str = ""
    # Rows that cannot be used: refuse, or leave out.
    on_missing: Literal["fail", "skip"] = "fail"

    def __post_init__(self) -> None:
        default = TableOptions()
        # Without a table they would be read by nobody.
        table_options = [
            option.name
            for option in fields(TableOptions)
            if getattr(self, option.name) != getattr(default, option.name)
        ]

        if table_options and not self.captions:
            raise ValueError(
                f"{', '.join(table_options)} choose from a table; name it with captions: TABLE"
            )


def open(options: Options, captions: Captions) -> Listed:
    """Read the table and find its images, or read the texts beside them; raises ValueError or
    OSError.
    """
    if not options.captions:
        return open_tree(options.path, options.split, options.on_missing, captions, paired=True)

    archive = Archive(options.path, options.split)
    refuse_without_images(archive)
    listing = items(options.captions, options)
    check_roles(listing.chosen.captions, captions, options.captions)

    named: list[Named] = []
    missing: list[str] = []
    for item in listing.items:
        name = archive.find(item.image)
        if name:
            named.append((item, name))
        else:
            reason = archive.why_not(item.image)
            missing.append(f"{listing.place(item)}: no image {item.image!r}: it {reason}")

    problems = listing.problems + missing
    if problems and options.on_missing == "fail":
        lines = "\n".join(problems[:10])
        raise ValueError(
            f"{len(problems)} rows cannot be used, {len(missing)} of them name images that are not "
            f"there; on_missing: skip leaves them out\n{lines}"
        )
    return Listed(archive, named, captions, problems, listing.notes)
