"""What a certainty is worth: hits over the share of queries that is kept, and by their certainty.

Queries of one certainty stand together: each counts as the mean of them, whatever their order.

A certainty is an adapter's (`vlp data certainty`), or the model's own (model.heads.concentration).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlp.eval import embed
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.models import certainty as adapters

OWN = "model"  # in place of an adapter's file: the model's own
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BINS = 10


def kept(hits: Tensor, certainty: Tensor, shares: tuple[float, ...] = SHARES) -> list[float]:
    """The mean of `hits` [n] over the most certain share of the queries, for each share; at least
    one query is kept. `certainty` [n]: higher is more certain.
    """
    ordered = _ordered(hits, certainty)
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)
    places = [max(1, round(share * len(ordered))) - 1 for share in shares]
    return means[places].tolist()


def by_bin(hits: Tensor, certainty: Tensor, n_bins: int = BINS) -> list[float]:
    """The mean of `hits` in bins of equally many queries, the least certain first; fewer bins where
    there are fewer queries.
    """
    ordered = _ordered(hits, certainty).flip(0)
    bins = torch.tensor_split(ordered, min(n_bins, len(ordered)))
    return [values.mean().item() for values in bins]


def spearman(values: list[float]) -> float:
    """Spearman's correlation of values with their places: 1 where they rise throughout, −1 where
    they fall; 0 where all are equal, or there is one.
    """
    ranks = _ranks(torch.tensor(values, dtype=torch.float64))
    places = torch.arange(len(values), dtype=torch.float64)
    ranks, places = ranks - ranks.mean(), places - places.mean()
    scale = ranks.norm() * places.norm()
    return 0.0 if scale == 0 else ((ranks @ places) / scale).item()


def _ordered(hits: Tensor, certainty: Tensor) -> Tensor:
    """The hits as float64, the most certain first, each the mean of those of its certainty."""
    if len(hits) != len(certainty) or not len(hits):
        raise ValueError(f"{len(hits)} hits and {len(certainty)} certainties; expected as many")
    if certainty.isnan().any():
        raise ValueError(f"{int(certainty.isnan().sum())} of {len(certainty)} certainties are NaN")

    levels, level, counts = certainty.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(levels), dtype=torch.float64).index_add_(0, level, hits.double())
    means = sums / counts
    return means[level.sort(descending=True).values]


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value; equal ones have the mean of theirs."""
    _, level, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[level]


def check(place: str) -> None:
    """Raise DataError where `place` is neither OWN nor a file of adapters."""
    if place == OWN:
        return
    try:
        adapters.load(place)
    except ValueError as error:
        raise DataError(f"certainty: {error}, or {OWN}") from None


def of_queries(
    place: str,
    encoder: Encoder,
    rows: dict[str, Tensor],  # of "image" and "text", unit rows
    pictures: list[Any],
    texts: list[str],
    context: Context,
) -> dict[str, Tensor]:
    """How certain each image and each text is, [N] and [M]. DataError where the model does not say,
    or the adapter is of another width.
    """
    if place != OWN:
        loaded = adapters.load(place)
        if loaded.form.width != rows["image"].shape[1]:
            raise DataError(
                f"certainty: {place} is of embeddings of {loaded.form.width} numbers "
                f"({loaded.form.model}), and {encoder.name} has {rows['image'].shape[1]}"
            )
        return {side: loaded.certainty(side, values) for side, values in rows.items()}

    if encoder.certainty is None:
        raise DataError(
            f"certainty: {encoder.name} does not say how certain its embeddings are; name a run "
            "with model.heads.concentration, which exports leave out, or an adapter of `vlp data "
            "certainty`"
        )
    of_image, of_text = encoder.certainty
    certain_encoder = replace(
        encoder,
        image=lambda pixels: _as_direction(of_image(pixels)),
        text=lambda captions: _as_direction(of_text(captions)),
        fingerprint=encoder.fingerprint and f"{encoder.fingerprint} certainty",
        width=None,
    )
    directions = {
        "image": embed.images(certain_encoder, pictures, context),
        "text": embed.texts(certain_encoder, texts, context),
    }
    return {side: values[:, 0] / values[:, 1] for side, values in directions.items()}


def _as_direction(values: Tensor) -> Tensor:
    """Numbers [n] as rows [n, 2] whose direction says them: what is embedded comes as unit rows."""
    return torch.stack([values, torch.ones_like(values)], 1)


def names(way: str) -> list[str]:
    """The scores of one way of retrieval."""
    return [f"{way}_retrieval_certainty_spearman", *(_of_share(way, s) for s in SHARES[1:])]


def scores(way: str, hits: Tensor, certainty: Tensor) -> dict[str, float]:
    """R@1 over each share of the queries that is kept, and Spearman's correlation over bins."""
    shares = dict(zip(SHARES, kept(hits, certainty)))
    rising = spearman(by_bin(hits, certainty))
    of_shares = {_of_share(way, share): shares[share] for share in SHARES[1:]}
    return {f"{way}_retrieval_certainty_spearman": rising} | of_shares


def _of_share(way: str, share: float) -> str:
    return f"{way}_retrieval_recall@1_of_{share:.0%}"
