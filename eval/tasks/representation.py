"""How the two kinds of embeddings lie on the sphere: modality gap, uniformity, alignment, rank,
temperature.

modality_gap          ‖mean x − mean t‖₂ (Liang et al. 2022)
linear_separability   held-out accuracy of a logistic regression that tells images from texts, 80 %
                      of the pairs for fitting (Fahim, Murphy and Fyshe 2024); 0.5 means no gap.
                      Penalty as in scikit-learn at C = 1.
uniformity_image, _text; alignment     Wang and Isola 2020
effective_rank_image, _text            Roy and Vetterli 2007
score_mean, _sd; other_score_mean, _sd; score_overlap   of pairs, and of all other combinations
auc, auc_error        how often a pair scores above another combination (0.5 by guessing), over all
                      of them, and by how much that may be wrong at most
auc_by_image, _text   the same of each image among its own combinations alone, and of each text: the
                      mean over queries, which takes no notice of how their scores lie to each other
temperature           1 / scale

Pairs are the images with their first captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import choices, distributions, embed, metrics, probes
from vlp.eval.datasets.source import Source
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval, shared

VERSION = 3  # 1 took equal pictures for several images; 2 saw transparency on black
KNOWN_AS = "representation"
MAIN = "modality_gap"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which images and captions."""

    data: str  # as for retrieval
    images: str | None = None  # as for retrieval
    split: str = "test"  # which split of the data is scored
    seed: int = 0  # of the 80/20 division
    missing: Literal["error", "skip"] = "error"  # annotations without their image


def read(options: Options) -> Source:
    """The images with captions; at least five of them."""
    source = retrieval.read(shared(retrieval.Options, options))
    # A fifth of fewer pairs would be none.
    if len(source.records) < 5:
        raise DataError(
            f"{options.data} has {len(source.records)} pairs; an 80/20 division needs at least 5"
        )
    return source


def run(encoder: Encoder, data: Source, options: Options, context: Context) -> TaskResult:
    """Measures of the geometry, and how well a line tells images from texts."""
    pictures = [record.picture for record in data.records]
    captions = [record.captions[0] for record in data.records]
    image = embed.images(encoder, pictures, context)
    text = embed.texts(encoder, captions, context)

    # How well a plane divides images from texts says what the distance of centroids cannot.
    hits = told_apart(image, text, options.seed)
    pairs = distributions.pair_scores(image, text)
    return TaskResult(
        data.name,
        items={
            "linear_separability": choices.accuracy(hits),
            "auc_by_image": choices.accuracy(pairs.auc_by_image),
            "auc_by_text": choices.accuracy(pairs.auc_by_text),
        },
        values={
            **metrics.geometry(image, text),
            **pairs.values,
            "temperature": 1 / encoder.scale,
        },
        chance=dict.fromkeys(("linear_separability", "auc", "auc_by_image", "auc_by_text"), 0.5),
        counts={"pairs": len(image), "skipped": len(data.skipped)},
        digest=context.digest(pictures, captions),
    )


def told_apart(image: Tensor, text: Tensor, seed: int) -> Tensor:
    """Hits of the regression on the 20 % of pairs that it has not seen, images and texts."""
    # Pairs are divided, not rows: a caption must not give its image away.
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    n_known = int(0.8 * len(image))
    known, new = order[:n_known], order[n_known:]

    weight, bias = probes.logistic_regression(
        torch.cat([image[known], text[known]]),
        torch.arange(2).repeat_interleave(n_known),  # 0 is an image, 1 a text
        2,
        decay=1 / (2 * n_known),
    )
    rows = torch.cat([image[new], text[new]]).double()
    answers = (rows @ weight.T + bias).argmax(1)
    return (answers == torch.arange(2).repeat_interleave(len(new))).double()
