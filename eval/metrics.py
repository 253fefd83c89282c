"""Metrics of embeddings: pure functions of tensors, exact, in memory that does not grow
with rows × columns.

Ties. Scores within `TIE` (the rounding of a float32 product of unit rows) are equal, and equal
scores count against the model in retrieval and in choices between captions: a wrong candidate that
scores as high as the right one is placed before it. So an encoder that gives everything the same
embedding finds nothing, the result does not depend on the order of the data, and the rule is the
one that compositional benchmarks publish (positive strictly above negative). A model that has
nearly collapsed tells candidates apart by less than `TIE`: its scores are computed in float64, and
equal is what lies within a thousandth of their spread, down to the rounding of the rows themselves.
clip_benchmark leaves retrieval's ties to `torch.topk`; the two differ where two images share the
very same caption.
Classes are different: some share a name (ImageNet's "missile" and "sunglasses" occur twice), and
the field resolves them by `argmax`: the class listed first wins. A constant encoder then always
answers the first class, which is chance in the mean per-class recall.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vlp import geometry as embedding_geometry

TIE = 1e-6  # of scores that are spread as those of ordinary models
ROUNDING = 1e-7  # of a unit row in float32, which bounds what its score can tell
SPREAD_SAMPLE = 512  # rows of each kind from which the spread is estimated
TILE_ROWS, TILE_COLUMNS = 1024, 4096  # a tile of scores is 16 MiB in float32


def check_unit_rows(rows: Tensor, name: str) -> None:
    """Raise ValueError unless every row of [n, D] is finite and of length one."""
    norms = rows.norm(dim=1)
    is_finite = torch.isfinite(norms)
    if not is_finite.all():
        n_bad = int((~is_finite).sum())
        raise ValueError(
            f"{n_bad} of {len(rows)} {name} embeddings are not finite; "
            "the model has diverged or overflows"
        )

    if len(norms) and float((norms - 1).abs().max()) > 1e-3:
        raise ValueError(
            f"{name} embeddings must be unit rows, "
            f"found lengths {float(norms.min()):.4g} to {float(norms.max()):.4g}"
        )


# --- ties -----------------------------------------------------------------------------------------


def tie(spread: float) -> float:
    """How far apart two scores may be and count as equal, where candidates' scores are spread by
    `spread` (their standard deviation): spread / 1000, between ROUNDING and TIE.
    """
    return min(TIE, max(ROUNDING, spread / 1000))


def tie_of_products(rows: Tensor, candidates: Tensor) -> float:
    """The tie for scores rows @ candidatesᵀ of unit rows [n, D] and [m, D], each row choosing among
    the candidates. The spread is that of a sample, the same at every call.
    """
    row_step = max(1, len(rows) // SPREAD_SAMPLE)
    candidate_step = max(1, len(candidates) // SPREAD_SAMPLE)
    scores = rows[::row_step].double() @ candidates[::candidate_step].double().T
    return tie_of_groups(scores)


def tie_of_groups(scores: Iterable[Tensor]) -> float:
    """The tie for scores of groups of candidates [m_i], each chosen among by itself."""
    # Around each group's own mean: how far all of them lie from others tells nothing apart.
    deviations = [group.double() - group.double().mean() for group in scores]
    every_deviation = torch.cat(deviations) if deviations else torch.zeros(1)
    return tie(float(every_deviation.square().mean().sqrt()))


def _precise(tie: float, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rows, in float64 where scores must be told apart by less than float32's products can."""
    return rows if tie == TIE else tuple(tensor.double() for tensor in rows)


# --- ranks ----------------------------------------------------------------------------------------


def class_ranks(
    image: Tensor,  # [n, D] unit rows
    classes: Tensor,  # [C, D] unit rows, one a class
    labels: Tensor,  # [n] int64, the right class
) -> Tensor:  # [n] int64
    """Rank of the right class among all by cosine: 1 + those above + those as high that are listed
    before it (see Ties).
    """
    tie = tie_of_products(image, classes)
    image, classes = _precise(tie, image, classes)
    ranks = []
    for start in range(0, len(image), TILE_ROWS):
        scores = image[start : start + TILE_ROWS] @ classes.T
        right = labels[start : start + TILE_ROWS, None]
        right_score = scores.gather(1, right)

        above = scores > right_score + tie
        listed_before = torch.arange(len(classes)) < right
        as_high = listed_before & (scores >= right_score - tie)
        ranks.append(1 + (above | as_high).sum(1))
    return torch.cat(ranks) if ranks else labels.new_zeros(0)


def retrieval_ranks(
    image: Tensor,  # [N, D] unit rows
    text: Tensor,  # [M, D] unit rows
    owner: Tensor,  # [M] int64, the image each caption belongs to
) -> tuple[Tensor, Tensor]:  # [N] and [M] int64
    """Ranks for text retrieval (of each image's best own caption) and image retrieval (of each
    caption's image).

    An image's rank is 1 + the number of foreign captions that score as high as the best of its own
    captions; a caption's is 1 + the number of other images that score as high as its own. So R@k =
    mean(rank <= k) is the field's recall, by which an image is a hit if any of its captions is
    among the k best. Both come from one pass over tiles of scores.
    """
    # Each side is told apart by itself: captions may lie close together where images do not.
    image_tie, text_tie = tie_of_products(image, text), tie_of_products(text, image)
    tie = min(image_tie, text_tie)

    # What a rival must reach: for a caption its own image, for an image the best of its captions.
    pair_scores = _pair_scores(image, text, owner, tie)  # [M]
    best_scores = pair_scores.new_full((len(image),), -torch.inf)
    best_scores = best_scores.scatter_reduce(0, owner, pair_scores, "amax")  # [N]

    # A rank begins at 1 and grows by every rival, tile by tile.
    image_rank = torch.ones(len(image), dtype=torch.int32)
    text_rank = torch.ones(len(text), dtype=torch.int32)

    image_bar, text_bar = best_scores - image_tie, pair_scores - text_tie
    for j in range(0, len(image), TILE_COLUMNS):
        columns = slice(j, j + TILE_COLUMNS)
        # A copy in float64, where there is one, is of a tile: never of a million rows.
        (of_columns,) = _precise(tie, image[columns])
        for i in range(0, len(text), TILE_ROWS):
            rows = slice(i, i + TILE_ROWS)
            (of_rows,) = _precise(tie, text[rows])
            scores = of_rows @ of_columns.T

            # A caption and its image are no rivals.
            in_tile = (owner[rows] >= j) & (owner[rows] < j + scores.shape[1])
            places = in_tile.nonzero()[:, 0]
            scores[places, owner[rows][places] - j] = -torch.inf

            text_rank[rows] += _count(scores >= text_bar[rows, None], 1)
            image_rank[columns] += _count(scores >= image_bar[columns], 0)
    return image_rank.long(), text_rank.long()


def _pair_scores(image: Tensor, text: Tensor, owner: Tensor, tie: float) -> Tensor:
    """[M] cosine of each caption with its image; in tiles, or the gathered images take M rows."""
    scores = []
    for rows, owners in zip(text.split(TILE_ROWS), owner.split(TILE_ROWS)):
        captions, images = _precise(tie, rows, image[owners])
        scores.append((captions * images).sum(1))
    return torch.cat(scores)


def _count(mask: Tensor, dim: int) -> Tensor:
    """How many are true along a dimension; bytes are counted faster than bools."""
    return mask.view(torch.uint8).sum(dim, dtype=torch.int32).cpu()


def nearest_neighbour_ranks(
    queries: Tensor,  # [n, D] unit rows
    bank: Tensor,  # [m, D] unit rows
    bank_labels: Tensor,  # [m] int64 in [0, C)
    labels: Tensor,  # [n] int64
    n_classes: int,
    k: int,
    temperature: float = 0.07,
) -> Tensor:  # [n] int64
    """Rank of the right class by the weighted vote of the k nearest: Σ e^{cos/T} a class (Wu et al.
    2018).
    """
    ranks = []
    for start in range(0, len(queries), TILE_ROWS):
        tile = queries[start : start + TILE_ROWS]
        nearest = (tile @ bank.T).topk(min(k, len(bank)), dim=1)

        # cos − 1 in the exponent: the same order, and no overflow at small temperatures.
        weights = ((nearest.values.double() - 1) / temperature).exp()
        votes = torch.zeros(len(tile), n_classes, dtype=torch.float64)
        votes.scatter_add_(1, bank_labels[nearest.indices], weights)

        right_votes = votes.gather(1, labels[start : start + TILE_ROWS, None])
        ranks.append((votes >= right_votes).sum(1))
    return torch.cat(ranks)


# --- scores ---------------------------------------------------------------------------------------


def per_class_weights(labels: Tensor) -> Tensor:
    """[n] weights 1 / (size of the item's class): their weighted mean of hits is the mean per-class
    recall.
    """
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    return 1.0 / counts[inverse].double()


def average_precision(
    scores: Tensor,  # [n, C]
    targets: Tensor,  # [n, C] bool, which labels apply
) -> Tensor:  # [C] float64
    """Average precision of each class: the mean, over its positive items, of the precision at the
    item's rank.

    Ties count against the model: among equal scores the wrong items come first. A class without any
    positive gives 0, as in clip_benchmark. Source: clip_benchmark's `mean_average_precision`, after
    torchnet's APMeter.
    """
    result = torch.zeros(scores.shape[1], dtype=torch.float64)
    for c in range(scores.shape[1]):
        # Two stable sorts: by score, and among equals the wrong items first.
        wrong_first = torch.argsort(targets[:, c].to(torch.uint8), stable=True)
        by_score = torch.argsort(scores[wrong_first, c], descending=True, stable=True)
        hits = targets[wrong_first[by_score], c].double()

        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, dtype=torch.float64)
        if hits.any():
            result[c] = (precision * hits).sum() / hits.sum()
    return result


def nearest(
    image: Tensor,  # [n, D] unit rows
    classes: Tensor,  # [C, D] unit rows
) -> Tensor:  # [n] int64
    """The class of highest cosine; of equal ones the first."""
    tiles = [(tile @ classes.T).argmax(1) for tile in image.split(TILE_ROWS)]
    return torch.cat(tiles) if tiles else torch.zeros(0, dtype=torch.int64)


def macro_f1(
    answers: Tensor,  # [n] int64, the classes chosen
    labels: Tensor,  # [n] int64, the right ones
) -> float:
    """The mean over the classes that are right somewhere of 2·hits / (chosen + right)."""
    n_classes = int(max(answers.max(), labels.max())) + 1
    n_right = torch.bincount(labels, minlength=n_classes)
    n_chosen = torch.bincount(answers, minlength=n_classes)
    n_hits = torch.bincount(labels[answers == labels], minlength=n_classes)

    occurs = n_right > 0
    f1 = 2 * n_hits.double() / (n_chosen + n_right)
    return float(f1[occurs].mean())


def strictly_above(right: Tensor, wrong: Tensor, tie: float = TIE) -> Tensor:
    """Where the right score is higher than the wrong one; a tie (see Ties) is not."""
    return right > wrong + tie


# --- geometry -------------------------------------------------------------------------------------


def modality_gap(image: Tensor, text: Tensor) -> float:
    """`vlp.geometry.modality_gap` in float64, as the two below."""
    return float(embedding_geometry.modality_gap(image.double(), text.double()))


def alignment(image: Tensor, text: Tensor) -> float:
    return float(embedding_geometry.alignment(image.double(), text.double()))


def uniformity(rows: Tensor, t: float = 2.0) -> float:
    return float(embedding_geometry.uniformity(rows.double(), t))


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred rows (Roy and Vetterli
    2007); 1 … min(n, D).
    """
    values = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    share = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(share).sum().exp())


def geometry(image: Tensor, text: Tensor) -> dict[str, float]:
    """How paired unit rows [n, D] of both kinds lie on the sphere, by the names of the record."""
    return {
        "modality_gap": modality_gap(image, text),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "alignment": alignment(image, text),
        "effective_rank_image": effective_rank(image),
        "effective_rank_text": effective_rank(text),
    }
