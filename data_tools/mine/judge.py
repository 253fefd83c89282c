"""Stored pairs before a judge (vlp.judges)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vlp.judges import Judge

if TYPE_CHECKING:
    from PIL.Image import Image


class Pair(NamedTuple):
    """What is judged."""

    image: bytes
    caption: str


def scores(judge: Judge, pairs: list[Pair]) -> list[float | None]:
    """The judge's score of each pair of one batch; None also where the picture does not open."""
    from vlp.data.picture import BadImage, rgb

    opened: dict[int, Image] = {}
    for place, pair in enumerate(pairs):
        try:
            opened[place] = rgb(pair.image)
        except BadImage:
            continue

    scored: list[float | None] = [None] * len(pairs)
    if opened:
        captions = [pairs[place].caption for place in opened]
        for place, score in zip(opened, judge.scores(list(opened.values()), captions)):
            scored[place] = score
    return scored
