"""An evaluation set once it is read: records of images, and what is known about them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from vlp.eval.pictures import Picture


@dataclass(frozen=True)
class Record:
    """One image and what is known about it."""

    picture: Picture
    captions: tuple[str, ...] = ()
    # class number, class name, or several numbers (multi-label)
    label: int | str | tuple[int, ...] | None = None
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's JSON, or the table's row


@dataclass
class Source:
    """An evaluation set as read, before a task asks something of it."""

    name: str
    records: list[Record]
    classes: list[str] | None = None  # by class number, where the set lists them
    templates: list[str] | None = None  # where the set brings its own
    multilabel: bool = False
    # annotations left out because their images are missing
    skipped: list[str] = field(default_factory=list)
    # Of a set in tars: which members no reader looks at, and which texts have no image.
    unread: str = ""
    n_joined: int = 0  # records that went because their pictures equal another one's


def equal_pictures(pictures: Iterable[Picture]) -> dict[Picture, Picture]:
    """Each picture with the first of those that hold the same, byte by byte, and are cut alike."""
    distinct = list(dict.fromkeys(pictures))
    sizes = Counter(picture.n_bytes() for picture in distinct)
    first: dict[Any, Picture] = {}
    first_of: dict[Picture, Picture] = {}
    for number, picture in enumerate(distinct):
        # Only pictures of one size can be equal: all others need not be read.
        is_alone = sizes[picture.n_bytes()] == 1
        content = number if is_alone else hashlib.sha256(picture.read()).digest()
        first_of[picture] = first.setdefault((content, picture.box, picture.border), picture)
    return first_of


def join_equal_pictures(
    source: Source,
    first_of: dict[Picture, Picture] | None = None,  # of more sets than this; None: of this one
) -> tuple[Source, int]:
    """The set with records of one picture, byte by byte, made one with the captions of all; and how
    many went.

    Otherwise the copies tie with each other, and a tie counts against every model.
    """
    if first_of is None:
        first_of = equal_pictures(record.picture for record in source.records)

    joined: dict[Picture, Record] = {}
    for record in source.records:
        picture = first_of[record.picture]
        earlier = joined.get(picture)
        if earlier is None:
            joined[picture] = replace(record, picture=picture)
        else:
            joined[picture] = _with_captions(earlier, record)
    return replace(source, records=list(joined.values())), len(source.records) - len(joined)


def _with_captions(record: Record, other: Record) -> Record:
    """The record with those captions of the other that it does not have."""
    more = tuple(caption for caption in other.captions if caption not in record.captions)
    return replace(record, captions=record.captions + more)
