"""A class-per-folder tree: `{name: classes, path: imagenet/train}`, with captions from `captions.class_templates`."""

from __future__ import annotations

from dataclasses import dataclass

from vlp.config import Captions
from vlp.data.archives import Archive
from vlp.data.sources._listed import Listed
from vlp.data.tables.trees import class_items


@dataclass(frozen=True)
class Options:
    """Where the tree is."""

    path: str  # a folder (or a tar) with one sub-folder a class


def open(options: Options, captions: Captions) -> Listed:
    """List the tree; raises ValueError or OSError."""
    archive = Archive(options.path)
    items, _ = class_items(archive)
    return Listed(archive, [(item, item.image) for item in items], captions, [])
