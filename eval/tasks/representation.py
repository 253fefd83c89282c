"""How the two kinds of embeddings lie on the sphere: modality gap, uniformity, alignment, rank,
temperature.

centroid_distance     ‖mean x − mean t‖₂ (Liang et al. 2022)
linear_separability   held-out accuracy of a logistic regression that tells images from texts, 80 % of the pairs for
                      fitting (Fahim, Murphy and Fyshe 2024); 0.5 means no gap. Penalty as in scikit-learn at C = 1.
uniformity_image, _text; alignment     Wang and Isola 2020
effective_rank_image, _text            Roy and Vetterli 2007
temperature           1 / scale

Pairs are the images with their first captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import choices, embed, metrics
from vlp.eval.datasets import Source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval, shared

VERSION = 2  # 1 took equal pictures for several images
KNOWN_AS = "representation"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which images and captions."""

    data: str  # as for retrieval
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    seed: int = 0  # of the 80/20 division
    missing: Literal["error", "skip"] = "error"  # annotations without their image


def read(options: Options) -> Source:
    source = retrieval.read(shared(retrieval.Options, options))
    if len(source.records) < 5:
        raise DataError(
            f"{options.data} has {len(source.records)} pairs; an 80/20 division needs at least 5"
        )
    return source


def run(encoder: Any, data: Source, options: Options, context: embed.Context) -> TaskResult:
    pictures, captions = [r.picture for r in data.records], [r.captions[0] for r in data.records]
    image, text = embed.images(encoder, pictures, context), embed.texts(encoder, captions, context)
    return TaskResult(
        data.name,
        items={"linear_separability": choices.accuracy(told_apart(image, text, options.seed))},
        values={
            "centroid_distance": metrics.centroid_distance(image, text),
            "uniformity_image": metrics.uniformity(image),
            "uniformity_text": metrics.uniformity(text),
            "alignment": metrics.alignment(image, text),
            "effective_rank_image": metrics.effective_rank(image),
            "effective_rank_text": metrics.effective_rank(text),
            "temperature": 1 / encoder.scale,
        },
        chance={"linear_separability": 0.5},
        counts={"pairs": len(image), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions),
    )


def told_apart(image: Tensor, text: Tensor, seed: int) -> Tensor:
    """Hits of the regression on the 20 % of pairs that it has not seen, images and texts."""
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    cut = int(0.8 * len(image))
    known, new = order[:cut], order[cut:]
    weight, bias = metrics.logistic_regression(
        torch.cat([image[known], text[known]]),
        torch.arange(2).repeat_interleave(cut),
        2,
        decay=1 / (2 * cut),
    )
    answers = (torch.cat([image[new], text[new]]).double() @ weight.T + bias).argmax(1)
    return (answers == torch.arange(2).repeat_interleave(len(new))).double()
