"""What embeddings show, as plain values: a projection, confusions, rankings, choices. Pure
functions of tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp.eval import metrics

TOP = 5


@dataclass(frozen=True)
class Projection:
    """Rows of both kinds in the plane of their two strongest directions."""

    image: list[tuple[float, float]]
    text: list[tuple[float, float]]
    shares: tuple[float, float]  # of the variance that the two directions carry


@dataclass(frozen=True)
class ClassAnswers:
    """What was answered for the pictures of one class."""

    number: int
    hits: int
    n: int
    answers: Counter[int]  # class -> how often it was the answer
    wrong: int | None  # a picture of it that was mistaken, by its place in the sample


@dataclass(frozen=True)
class Query:
    """One query and its best candidates, best first."""

    place: int  # of the query
    rank: int  # of its best right candidate; 1 is a hit
    best: list[tuple[int, float, bool]]  # candidate, cosine, whether it is right
    right: tuple[int, float]  # its best right candidate and that one's cosine


def projection(image: Tensor, text: Tensor) -> Projection:
    """Principal components of both kinds together, by an exact singular value decomposition of the
    centred rows [2n, D].

    Each direction's sign is chosen so that its largest weight is positive: the same model gives the
    same picture.
    """
    rows = torch.cat([image, text]).double()
    centred = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    two = (
        directions[:2]
        * directions[:2].gather(1, directions[:2].abs().argmax(1, keepdim=True)).sign()
    )
    flat = centred @ two.T
    total = float(values.square().sum()) or 1.0
    shares = [float(v) for v in values[:2].square() / total]
    places = [tuple(p) for p in torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])).tolist()]
    return Projection(
        places[: len(image)],
        places[len(image) :],
        (shares[0], shares[1] if len(shares) > 1 else 0.0),
    )


def confusions(image: Tensor, classes: Tensor, labels: Tensor, worst: int) -> list[ClassAnswers]:
    """The `worst` classes by recall (then by how many pictures show it), worst first. Ties go as in
    `metrics.class_ranks`.
    """
    answers = (image @ classes.T).argmax(1)
    found = []
    for number in labels.unique().tolist():
        places = (labels == number).nonzero()[:, 0]
        given = answers[places]
        missed = places[given != number]
        hits = int((given == number).sum())
        wrong = int(missed[0]) if len(missed) else None
        found.append(ClassAnswers(number, hits, len(places), Counter(given.tolist()), wrong))
    return sorted(found, key=lambda c: (c.hits / c.n, -c.n))[:worst]


def queries(query: Tensor, candidates: Tensor, right: Tensor, ranks: Tensor, n: int) -> list[Query]:
    """`n` queries, failures first (the lowest ranked of all first), then hits. `right`: [queries,
    candidates] bool.
    """
    order = torch.argsort(ranks, descending=True, stable=True).tolist()
    order = _one_each(order, [tuple(row.nonzero()[:, 0].tolist()) for row in right])
    failures = [i for i in order if ranks[i] > 1]
    hits = [i for i in order if ranks[i] == 1]
    n_failures = min(len(failures), max(n - 2, n - len(hits)))
    shown = []
    for i in failures[:n_failures] + hits[: n - n_failures]:
        scores = query[i] @ candidates.T
        top = scores.topk(min(TOP, len(scores)))
        best = [
            (j, s, bool(right[i, j])) for s, j in zip(top.values.tolist(), top.indices.tolist())
        ]
        own = int(scores.masked_fill(~right[i], -torch.inf).argmax())
        shown.append(Query(i, int(ranks[i]), best, (own, float(scores[own]))))
    return shown


def _one_each(order: list[int], answers: list[tuple[int, ...]]) -> list[int]:
    """The first query of each right answer: an image's captions often fail alike, and one of them
    says it.
    """
    first: dict[tuple[int, ...], int] = {}
    for i in order:
        first.setdefault(answers[i], i)
    return list(first.values())


def choices(scores: Sequence[Tensor], n: int) -> tuple[list[int], list[bool]]:
    """Places of `n` items to show, clearest failures first and at least two hits if there are; and
    which items are hits.

    `scores`: of each item's true caption, then of its negatives.
    """
    hits = [bool(metrics.strictly_above(s[0], s[1:]).all()) for s in scores]
    margins = [float(s[0] - s[1:].max()) for s in scores]
    order = sorted(range(len(scores)), key=lambda i: margins[i])
    wrong, good = [i for i in order if not hits[i]], [i for i in order if hits[i]]
    n_wrong = min(len(wrong), max(n - 2, n - len(good)))
    return wrong[:n_wrong] + good[: n - n_wrong], hits
