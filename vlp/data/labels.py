"""The labels of samples: numbers by which terms know pairs of one kind (`Batch.label`).

`data.labels` says what makes two pairs of one kind:

    caption   the same caption in the row: compared in lower case, with single blanks, and without
              the punctuation at its end, so that "A dog." is "a dog"
    origin    the same origin: variations of one picture
    FIELD     the same text or whole number in a field of the JSON, such as class or cls

A label is a hash of that text, below 2^48: two numbers of 24 bits, which float32 holds exactly.
Dense numbers would need every caption of the data read before the first step. Two different texts
among n share a label with a probability of n²/2^49, which is 2 in a million at n = 32,768.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Iterable
from typing import Any

from vlp.data.row import Row
from vlp.data.sources import Source
from vlp.types import Sample

CAPTION = "caption"
ORIGIN = "origin"

_BYTES = 6  # of a label
_PROBED = 64  # samples of a source that are looked at before the first step
_STOPS = string.punctuation + "…。！？、，" + string.whitespace


def of_text(text: str) -> int:
    """The label of a text, 0 ≤ label < 2^48, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_BYTES).digest(), "little")


def normalised(caption: str) -> str:
    """A caption as it is compared with others."""
    return " ".join(caption.lower().split()).rstrip(_STOPS)


def of_row(row: Row, kind: str) -> int:
    """The label of a row's pair; ValueError where its sample has none."""
    if kind == CAPTION:
        return of_text(normalised(row.caption))
    return of_text(_field(row.sample, kind))


def kind_of(configured: str | None, read: Iterable[str | None]) -> str | None:
    """What labels are made of: as configured, else what the terms that read them say in their
    `positives`. ValueError where they want several kinds at once, or a field that nobody names.

    read: of each term "caption", "origin", "label" for a field, or None or "none".
    """
    kinds = {CAPTION, ORIGIN, "label"}.intersection(filter(None, read))
    # "label" is whatever data.labels names.
    named: set[str] = kinds - {"label"}
    if configured is not None:
        named.add(configured)

    if len(named) > 1:
        raise ValueError(
            f"a batch has labels of one kind, and data.labels and the terms' positives name "
            f"{', '.join(sorted(named))}; make them one"
        )
    if "label" in kinds and not named:
        raise ValueError(
            "a term's positives: label reads a field of the samples' JSON; say which with "
            "data.labels, such as data.labels: class"
        )
    return named.pop() if named else None


def check(sources: Iterable[Source], kind: str) -> None:
    """Refuse data of which some samples have no label, by a look at 64 samples of each source.

    Further ones are unusable samples when their turn comes.
    """
    if kind == CAPTION:
        return

    for s, source in enumerate(sources):
        reasons = [reason for i in _probed(source) if (reason := _reason(source, i, kind))]
        if reasons:
            n_probed = min(len(source), _PROBED)
            raise ValueError(
                f"data.labels is {kind!r}, and {len(reasons)} of {n_probed} samples of source {s} "
                f"that were looked at have no such label: {reasons[0]}. Name a field that every "
                "sample has, or add it to them"
            )


def _probed(source: Source) -> list[int]:
    """Some samples of a source: at random, or the first ones where each would cost a shard."""
    n = len(source)
    if source.window or source.reserve:
        return list(range(min(n, _PROBED)))
    return random.Random(n).sample(range(n), min(n, _PROBED))


def _reason(source: Source, i: int, kind: str) -> str:
    """Why a sample has no label, "" where it has one, or cannot be read at all."""
    try:
        sample = source[i]
    except (OSError, ValueError):
        return ""  # counted as unusable when its turn comes
    try:
        _field(sample, kind)
    except ValueError as error:
        return str(error)
    return ""


def _field(sample: Sample, name: str) -> str:
    """A text or whole number of a sample's JSON, as text."""
    value: Any = sample.meta.get(name)
    if isinstance(value, str) and value.strip():
        return value.strip()
    # True is a number to Python, and 3.0 is how a table may write 3.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError(
        f"{sample.key!r} has {str(value)[:20]!r} under {name!r}, expected a text or a whole number"
    )
