"""What embeddings show, as plain values: a projection, confusions, rankings, choices. Pure
functions of tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlp.eval import choices

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


class Candidate(NamedTuple):
    """An answer to a query."""

    place: int
    score: float  # cosine with the query
    is_right: bool


@dataclass(frozen=True)
class Ranking:
    """How queries find the right ones among candidates."""

    query: Tensor  # [q, D] unit rows
    candidates: Tensor  # [c, D] unit rows
    right: Tensor  # [q, c] bool
    ranks: Tensor  # [q] int64, of the best right candidate


@dataclass(frozen=True)
class Query:
    """One query and its best candidates, best first."""

    place: int  # of the query
    rank: int  # of its best right candidate; 1 is a hit
    best: list[Candidate]
    right: tuple[int, float]  # its best right candidate and that one's cosine


def projection(image: Tensor, text: Tensor) -> Projection:
    """Principal components of both kinds together, by an exact singular value decomposition of the
    centred rows [2n, D].

    Each direction's sign is chosen so that its largest weight is positive: the same model gives the
    same picture.
    """
    # Together: the gap between images and texts is then often the first direction.
    rows = torch.cat([image, text]).double()
    centred = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)

    strongest = directions[:2]
    largest = strongest.abs().argmax(1, keepdim=True)
    flat = centred @ (strongest * strongest.gather(1, largest).sign()).T
    # A space of one dimension lies on a line of the plane.
    flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    points = [tuple(point) for point in flat.tolist()]

    # Embeddings that are all the same have no variance to share.
    total = float(values.square().sum()) or 1.0
    shares = [float(share) for share in values[:2].square() / total]
    second_share = shares[1] if len(shares) > 1 else 0.0
    return Projection(points[: len(image)], points[len(image) :], (shares[0], second_share))


def confusions(
    answers: Tensor,  # [n] int64, the class of highest cosine; ties go as in metrics.class_ranks
    labels: Tensor,  # [n] int64, the right class
    worst: int,
) -> list[ClassAnswers]:
    """The `worst` classes by recall (then by how many pictures show it), worst first."""
    by_class = []
    for number in labels.unique().tolist():
        places = (labels == number).nonzero()[:, 0]
        answers_of_class = answers[places]
        missed = places[answers_of_class != number]
        wrong = int(missed[0]) if len(missed) else None

        hits = int((answers_of_class == number).sum())
        counts = Counter(answers_of_class.tolist())
        by_class.append(ClassAnswers(number, hits, len(places), counts, wrong))

    def recall_then_size(of_class: ClassAnswers) -> tuple[float, int]:
        return of_class.hits / of_class.n, -of_class.n

    return sorted(by_class, key=recall_then_size)[:worst]


def queries(ranking: Ranking, n: int) -> list[Query]:
    """`n` queries, failures first (the lowest ranked of all first), then hits."""
    ranks = ranking.ranks
    order = torch.argsort(ranks, descending=True, stable=True).tolist()
    answers = [tuple(row.nonzero()[:, 0].tolist()) for row in ranking.right]
    order = _one_each(order, answers)
    # The order is by rank, so both lists keep the lowest ranked first.
    failures = [i for i in order if ranks[i] > 1]
    hits = [i for i in order if ranks[i] == 1]

    shown = _failures_then_hits(failures, hits, n)
    return [_answered(i, ranking) for i in shown]


def asked(ranking: Ranking, n: int) -> list[Query]:
    """`n` queries evenly spread over all, whatever they come to."""
    n_queries = len(ranking.query)
    places = torch.linspace(0, n_queries - 1, min(n, n_queries)).round().long().unique()
    return [_answered(i, ranking) for i in places.tolist()]


def _answered(i: int, ranking: Ranking) -> Query:
    """Query number i with its nearest candidates."""
    scores, right = ranking.query[i] @ ranking.candidates.T, ranking.right
    top = scores.topk(min(TOP, len(scores)))
    best = []
    for score, place in zip(top.values.tolist(), top.indices.tolist()):
        best.append(Candidate(place, score, bool(right[i, place])))

    # The right answer is shown even where it is not among the best.
    best_right = int(scores.masked_fill(~right[i], -torch.inf).argmax())
    return Query(i, int(ranking.ranks[i]), best, (best_right, float(scores[best_right])))


def _one_each(order: list[int], answers: list[tuple[int, ...]]) -> list[int]:
    """The first query of each right answer: an image's captions often fail alike, and one of them
    says it.
    """
    first: dict[tuple[int, ...], int] = {}
    for i in order:
        first.setdefault(answers[i], i)
    return list(first.values())


def _failures_then_hits(failures: list[int], hits: list[int], n: int) -> list[int]:
    """At most `n`, failures first, with at least two hits if there are."""
    n_failures = min(len(failures), max(n - 2, n - len(hits)))
    return failures[:n_failures] + hits[: n - n_failures]


def examples_to_show(scores: Sequence[Tensor], n: int) -> tuple[list[int], list[bool]]:
    """Places of `n` items to show, clearest failures first and at least two hits if there are; and
    which items are hits.

    `scores`: of each item's true caption, then of its negatives.
    """
    hits = [bool(hit) for hit in choices.first_is_best(scores)]

    # A failure is clear where a negative lies far above the true caption.
    margins = [float(s[0] - s[1:].max()) for s in scores]

    order = sorted(range(len(scores)), key=margins.__getitem__)
    failures = [i for i in order if not hits[i]]
    return _failures_then_hits(failures, [i for i in order if hits[i]], n), hits
