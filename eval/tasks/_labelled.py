"""What the probes share: two splits of a labelled set with the same classes, embedded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vlp.eval import choices, embed, metrics
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, shared, zeroshot


@dataclass
class Splits:
    """A set to learn from and a set to be tested on."""

    train: zeroshot.Data
    test: zeroshot.Data


def read(options: Any) -> Splits:
    """Open both, as the options of a probe say; their classes must be the same."""
    train, test = one(options, options.train_split), one(options, options.split)
    names = f"splits {options.train_split!r} and {options.split!r} of {options.data}"

    # A class's number must mean the same in both.
    if train.classes != test.classes:
        in_one_only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{names} have different classes: {', '.join(in_one_only[:5])}")
    if train.labels.ndim == 2:
        raise DataError(f"{options.data} has several labels an image; probes need one")

    # A picture in both splits would be its own nearest neighbour.
    train_pictures = {record.picture for record in train.source.records}
    if any(record.picture in train_pictures for record in test.source.records):
        raise DataError(f"{names} share pictures; give separate splits")
    return Splits(train, test)


def one(options: Any, split: str) -> zeroshot.Data:
    """One split as zero-shot classification reads it."""
    return zeroshot.read(shared(zeroshot.Options, options, split=split, partial=True))


def embedded(encoder: Encoder, data: zeroshot.Data, context: Context) -> Tensor:
    """[n, D] unit rows of a split's pictures."""
    return embed.images(encoder, [record.picture for record in data.source.records], context)


def result(ranks: Tensor, data: Splits, context: Context, *annotations: Any) -> TaskResult:
    """Accuracies from the ranks of the right classes.

    annotations: what else of the data decides about the scores, for their hash.
    """
    n_classes = len(data.test.classes)
    weights = metrics.per_class_weights(data.test.labels)
    first = (ranks == 1).double()
    items = {
        "acc1": choices.accuracy(first),
        "mean_per_class_recall": torch.stack([first * weights, weights], 1),
    }
    # Among fewer than five classes the top five are all.
    if n_classes >= 5:
        items["acc5"] = choices.accuracy(ranks <= 5)

    sources = (data.train.source, data.test.source)
    records = chain.from_iterable(source.records for source in sources)
    pictures = [record.picture for record in records]
    labels = (data.train.labels.tolist(), data.test.labels.tolist())
    return TaskResult(
        data.test.source.name,
        items=items,
        chance={name: (5 if name == "acc5" else 1) / n_classes for name in items},
        counts={
            "train_images": len(data.train.labels),
            "images": len(ranks),
            "classes": n_classes,
            "skipped": sum(len(source.skipped) for source in sources),
        },
        digest=context.digest(pictures, *labels, annotations),
    )
