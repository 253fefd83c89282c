"""Uniformity and tolerance: how evenly pictures are spread, and how close those of a class stay
(Wang and Liu 2021, "Understanding the Behaviour of Contrastive Loss").

tolerance             mean of x_i · x_j over pairs of one class
tolerance_all_pairs   the paper's: mean over all pairs, those of other classes counting as 0
mean_cosine           mean of x_i · x_j over all pairs: tolerance if classes meant nothing
uniformity_image      log mean e^{−2‖x_i − x_j‖²} over all pairs; lower is more even
alignment             mean ‖x_i − t_c(i)‖² to the picture's class, embedded as in `zeroshot`

A low temperature buys uniformity with tolerance. No score has a chance level. The report of a run
draws both over its evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlp.eval import distributions, embed, metrics
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, zeroshot

VERSION = 1
KNOWN_AS = "representation"
MAIN = "tolerance"
SCORES = ("tolerance", "tolerance_all_pairs", "mean_cosine", "uniformity_image", "alignment")


@dataclass(frozen=True)
class Options(zeroshot.Options):
    """Which labelled pictures, and how their classes are said."""


def read(options: Options) -> zeroshot.Data:
    """The set as zero-shot classification reads it; a class needs two pictures."""
    data = zeroshot.read(options)
    if data.labels.ndim == 2:
        raise DataError(f"{options.data} has several labels an image; tolerance needs one")
    if int(data.labels.bincount().max()) < 2:
        raise DataError(
            f"{options.data} has one picture a class ({len(data.labels)} in all); tolerance is of "
            "pairs of one class and needs two"
        )
    return data


def run(encoder: Encoder, data: zeroshot.Data, options: Options, context: Context) -> TaskResult:
    """The geometry of the pictures, and of each with its class."""
    image = embed.images(encoder, [record.picture for record in data.source.records], context)
    class_rows = zeroshot.class_embeddings(encoder, data.templates, data.classes, context)

    within, over_all_pairs = distributions.tolerance(image, data.labels)
    one_class = torch.zeros_like(data.labels)
    mean_cosine, _ = distributions.tolerance(image, one_class)

    result = zeroshot.blank_result(data, context)
    result.values = {
        "tolerance": within,
        "tolerance_all_pairs": over_all_pairs,
        "mean_cosine": mean_cosine,
        "uniformity_image": metrics.uniformity(image),
        "alignment": metrics.alignment(image, class_rows[data.labels]),
    }
    return result
