"""An evaluation set once it is read: records of images, and what is known about them."""

from __future__ import annotations

import hashlib
from collections import Counter
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
    n_joined: int = 0  # records that went because their pictures equal another one's


def join_equal_pictures(source: Source) -> tuple[Source, int]:
    """The set with records of one picture, byte by byte, made one with the captions of all; and how
    many went.

    Otherwise the copies tie with each other, and a tie counts against every model.
    """
    sizes = Counter(record.picture.n_bytes() for record in source.records)
    first: dict[Any, int] = {}
    joined: dict[int, Record] = {}
    for i, record in enumerate(source.records):
        # Only pictures of one size can be equal: all others need not be read.
        is_alone = sizes[record.picture.n_bytes()] == 1
        content = i if is_alone else hashlib.sha256(record.picture.read()).digest()

        earlier = first.setdefault((content, record.picture.box, record.picture.border), i)
        joined[earlier] = record if earlier == i else _with_captions(joined[earlier], record)
    return replace(source, records=list(joined.values())), len(source.records) - len(joined)


def _with_captions(record: Record, other: Record) -> Record:
    """The record with those captions of the other that it does not have."""
    more = tuple(caption for caption in other.captions if caption not in record.captions)
    return replace(record, captions=record.captions + more)
