"""A class-per-folder tree: `{name: classes, path: imagenet/train}`, with captions from
`captions.class_templates`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlp.config import Captions
from vlp.data.sources._listed import Listed, open_tree


@dataclass(frozen=True)
class Options:
    """Where the tree is."""

    path: str  # a folder (or a tar) with one sub-folder a class
    # The sub-folder to take where the path holds splits (train, val, …).
    split: str = ""
    # Class folders without images, images outside of one: refuse, or leave out.
    on_missing: Literal["fail", "skip"] = "fail"


def open(options: Options, captions: Captions) -> Listed:
    """List the tree; raises ValueError or OSError."""
    return open_tree(options.path, options.split, options.on_missing, captions, paired=False)
