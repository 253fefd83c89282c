"""The further texts of a row, by the field of `vlp.fields` that they become.

A text field is its row in the table and an entry of `TEXTS`: how many texts of a row the data
offer, and which. Tokenizing and the masks are the same for all (`vlp.data.steps`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vlp.config import Data
from vlp.data.row import Row, captions_beside
from vlp.data.sources import Source
from vlp.data.wording import vary


class Texts(NamedTuple):
    """The texts of one row, padded to the width of the field, and which of them count."""

    texts: list[str]
    valid: list[bool]


@dataclass(frozen=True)
class TextField:
    """How a text field of a batch is made."""

    # The width that the data offer: texts of a row, at most; 0: the field is not carried.
    width: Callable[[list[Source], Data], int]
    # The texts of a row, exactly as many as its third argument says.
    of_row: Callable[[Row, Data, int], Texts]
    # Whether knowing the width may take reading every sample: then it is asked only where a term
    # reads the field.
    counted: bool = False


def most_captions(sources: list[Source], data: Data) -> int:
    """K', the most captions of a sample that stand beside one another; 0 where none do, or all
    samples have one.
    """
    config = data.captions
    # A role has its column also where few samples have it; sentences are not counted.
    if not config.n_beside or config.roles or config.choose != "all":
        return config.n_beside

    most = min(config.n_beside, max(_most_of(source, config.n_beside) for source in sources))
    return most if most > 1 else 0


def captions(row: Row, data: Data, width: int) -> Texts:
    """The captions that stand beside one another in the row."""
    beside = captions_beside(row, data.captions)
    texts = [text or "" for text in beside]
    return padded(texts, [text is not None for text in beside], width)


def most_negatives(sources: list[Source], data: Data) -> int:
    return max(source.n_negatives for source in sources)


def negatives(row: Row, data: Data, width: int) -> Texts:
    """The hard captions of the row's caption."""
    wrong, places = row.wrong("negatives")
    places = places[:width]

    texts = [wrong.texts[place] for place in places]
    valid = [wrong.valid[place] for place in places]
    return padded(texts, valid, width)


def most_counterfactuals(sources: list[Source], data: Data) -> int:
    return max(source.n_counterfactuals for source in sources)


def counterfactuals(row: Row, data: Data, width: int) -> Texts:
    """The counterfactuals of the row's caption, or empty texts; fewer are repeated, so that a
    valid row has only real texts.

    Which one comes first, which is all that a loss of one counterfactual sees, is drawn anew at
    each visit.
    """
    wrong, places = row.wrong("counterfactuals")
    texts = [wrong.texts[place] for place in places if wrong.valid[place]]
    if not texts:
        return padded([], [], width)

    first = row.draw("counterfactual") % len(texts)
    return Texts([texts[(first + i) % len(texts)] for i in range(width)], [True] * width)


def n_views(sources: list[Source], data: Data) -> int:
    return data.views.n if data.views else 0


def text_views(row: Row, data: Data, width: int) -> Texts:
    """The row's caption in other words."""
    assert data.views is not None, "`n_views` is 0 without"
    changes = data.views.text
    texts = [vary(row.caption, changes, row.chance("wording", v)) for v in range(width)]
    return Texts(texts, [True] * width)


TEXTS = {
    "captions": TextField(most_captions, captions, counted=True),
    "negatives": TextField(most_negatives, negatives),
    "counterfactual": TextField(most_counterfactuals, counterfactuals),
    "text_views": TextField(n_views, text_views),
}


def padded(texts: list[str], valid: list[bool], width: int) -> Texts:
    """`width` texts: those given, then empty ones that do not count."""
    missing = width - len(texts)
    return Texts(texts + [""] * missing, valid + [False] * missing)


def _most_of(source: Source, bound: int) -> int:
    """The most captions of one sample; `bound` where the source cannot know before it has read."""
    try:
        counts = source.n_captions()
    except ValueError:
        return bound
    return int(counts.max())
