"""What an evaluation set is once it is read: records of images, and what is known about them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

from vlp.eval.pictures import Picture


@dataclass(frozen=True)
class Record:
    """One image and what is known about it."""

    picture: Picture
    captions: tuple[str, ...] = ()
    label: int | str | tuple[int, ...] | None = (
        None  # class number, class name, or several numbers (multi-label)
    )
    meta: dict[str, Any] = field(default_factory=dict)  # the sample's JSON, or the table's row


@dataclass
class Source:
    """An evaluation set as read, before a task asks something of it."""

    name: str
    records: list[Record]
    classes: list[str] | None = None  # by class number, where the set lists them
    templates: list[str] | None = None  # where the set brings its own
    multilabel: bool = False
    skipped: list[str] = field(
        default_factory=list
    )  # annotations left out because their images are missing
    n_joined: int = 0  # records that went because their pictures equal another one's


def join_equal_pictures(source: Source) -> tuple[Source, int]:
    """The set with records of one picture, byte by byte, made one with the captions of all; and how
    many went.

    Otherwise the copies tie with each other, and a tie counts against every model.
    """
    by_size: dict[int, list[int]] = {}
    for i, record in enumerate(source.records):
        by_size.setdefault(record.picture.n_bytes(), []).append(i)
    first: dict[Any, int] = {}
    joined: dict[int, Record] = {}
    for i, record in enumerate(source.records):
        alone = (
            len(by_size[record.picture.n_bytes()]) == 1
        )  # no other picture has this size: none is equal
        content = i if alone else hashlib.sha256(record.picture.read()).digest()
        earlier = first.setdefault((content, record.picture.box, record.picture.border), i)
        if earlier == i:
            joined[i] = record
        else:
            before = joined[earlier].captions
            more = tuple(caption for caption in record.captions if caption not in before)
            joined[earlier] = replace(joined[earlier], captions=before + more)
    return replace(source, records=list(joined.values())), len(source.records) - len(joined)
