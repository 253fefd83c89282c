"""Queries and candidates that are a picture, a text, or both, and the precision at 1.

With q a query's embedding and c_1 … c_n those of its candidates, the right one first, a query is
right where q·c_1 > q·c_j for all j > 1. A tie is wrong (vlp.eval.metrics says why).

A picture stands where its mark does in the text, at its beginning without a mark. A multimodal
language model reads both as one; for other models `together` says what stands for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from vlp.eval import choices, embed
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError, Picture

MARK = "<|image_1|>"  # of a picture's place in a text, as MMEB writes it

# How a picture with a text is embedded: by the model, as one; as its picture, or its text, alone;
# or as the sum of both embeddings.
Together = Literal["model", "image", "text", "sum"]


@dataclass(frozen=True)
class Entry:
    """A query or a candidate: a picture, a text, or both."""

    picture: Picture | None
    before: str = ""  # text before the picture; all of it where there is none
    after: str = ""  # text behind the picture

    @classmethod
    def of(cls, text: str, picture: Picture | None) -> Entry:
        """By a text in which a mark may stand for the picture."""
        if picture is None:
            return cls(None, " ".join(text.replace(MARK, " ").split()))
        before, mark, after = text.partition(MARK)
        return cls(picture, before, after.replace(MARK, " ")) if mark else cls(picture, "", text)

    @property
    def words(self) -> str:
        """Its text alone."""
        return " ".join(f"{self.before} {self.after}".split())

    @property
    def has_both(self) -> bool:
        return self.picture is not None and bool(self.words)


@dataclass(frozen=True)
class Query:
    """What is asked for, and the candidates, the right one first."""

    asked: Entry
    candidates: tuple[Entry, ...]
    group: str  # the data set that it belongs to


def check(encoder: Encoder, queries: Sequence[Query], together: Together) -> None:
    """Refuse a model that cannot embed a picture and a text as one, where that is asked of it."""
    if together != "model" or encoder.joint is not None:
        return
    n_both = sum(query.asked.has_both for query in queries)
    n_candidates = sum(any(entry.has_both for entry in query.candidates) for query in queries)
    if n_both or n_candidates:
        raise DataError(
            f"{encoder.name} embeds a picture or a text, not both as one, and {n_both:,} of "
            f"{len(queries):,} queries hold both, {n_candidates:,} have candidates that do; set "
            "together=sum for the sum of both embeddings, or together=image or together=text for "
            "one of them"
        )


def embeddings(
    encoder: Encoder, entries: Sequence[Entry], together: Together, context: Context
) -> Tensor:
    """[n, D] unit rows, float64, in the order of the entries."""
    unique = list(dict.fromkeys(entries))
    ways = [_way(entry, together) for entry in unique]
    rows = torch.zeros(0)

    # In one order on every rank: each way is a collective of its own.
    for way in ("text", "image", "model", "sum"):
        places = [place for place, other in enumerate(ways) if other == way]
        if not places:
            continue
        embedded = _embedded(encoder, [unique[place] for place in places], way, context).double()
        if not len(rows):
            rows = torch.zeros(len(unique), embedded.shape[1], dtype=torch.float64)
        rows[places] = embedded

    place_of = {entry: place for place, entry in enumerate(unique)}
    return rows[[place_of[entry] for entry in entries]]


def _way(entry: Entry, together: Together) -> str:
    """How an entry is embedded: as `together` says where it has both."""
    if entry.has_both:
        return together
    return "text" if entry.picture is None else "image"


def _embedded(encoder: Encoder, entries: Sequence[Entry], way: str, context: Context) -> Tensor:
    """Unit rows of entries of one way."""
    texts = [entry.words for entry in entries]
    if way == "text":
        return embed.texts(encoder, texts, context)

    pictures = [entry.picture for entry in entries if entry.picture is not None]
    if way == "image":
        return embed.images(encoder, pictures, context)
    if way == "sum":
        of_texts = embed.texts(encoder, texts, context)
        both = of_texts + embed.images(encoder, pictures, context)
        return torch.nn.functional.normalize(both, dim=1)
    around = [(entry.before, entry.after) for entry in entries]
    return embed.joint(encoder, list(zip(pictures, around)), context)


def hits(
    encoder: Encoder, queries: Sequence[Query], together: Together, context: Context
) -> Tensor:
    """[n] float64: 1 where the right candidate is strictly above all others."""
    asked = embeddings(encoder, [query.asked for query in queries], together, context)
    every_candidate = list(chain.from_iterable(query.candidates for query in queries))
    candidates = embeddings(encoder, every_candidate, together, context)

    of_queries = candidates.split([len(query.candidates) for query in queries])
    scores = [rows @ row for row, rows in zip(asked, of_queries)]
    return choices.first_is_best(scores)
