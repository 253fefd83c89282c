"""What the probes share: two splits of a labelled set with the same classes, embedded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp.eval import choices, embed, metrics
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, shared, zeroshot


@dataclass
class Splits:
    """A set to learn from and a set to be tested on."""

    train: zeroshot.Data
    test: zeroshot.Data


def read(options: Any) -> Splits:
    """Open both, as the options of a probe say; their classes must be the same."""
    data, train_split, split = options.data, options.train_split, options.split
    train, test = (
        zeroshot.read(shared(zeroshot.Options, options, split=part, partial=True))
        for part in (train_split, split)
    )
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(
            f"splits {train_split!r} and {split!r} of {data} have different classes: {', '.join(only[:5])}"
        )
    if train.labels.ndim == 2:
        raise DataError(f"{data} has several labels an image; probes need one")
    files = {r.picture for r in train.source.records}
    if any(r.picture in files for r in test.source.records):
        raise DataError(
            f"splits {train_split!r} and {split!r} of {data} share pictures; give separate splits"
        )
    return Splits(train, test)


def embedded(encoder: Any, data: zeroshot.Data, context: embed.Context) -> Tensor:
    """[n, D] unit rows of a split's pictures."""
    return embed.images(encoder, [r.picture for r in data.source.records], context)


def result(ranks: Tensor, data: Splits, context: embed.Context, *settings: Any) -> TaskResult:
    """Accuracies from the ranks of the right classes."""
    n_classes, weights = len(data.test.classes), metrics.per_class_weights(data.test.labels)
    first = (ranks == 1).double()
    items = {
        "acc1": choices.accuracy(first),
        "mean_per_class_recall": torch.stack([first * weights, weights], 1),
    }
    if n_classes >= 5:
        items["acc5"] = choices.accuracy(ranks <= 5)
    n_skipped = sum(len(part.source.skipped) for part in (data.train, data.test))
    pictures = [r.picture for part in (data.train, data.test) for r in part.source.records]
    return TaskResult(
        data.test.source.name,
        items=items,
        chance={name: (5 if name == "acc5" else 1) / n_classes for name in items},
        counts={
            "train_images": len(data.train.labels),
            "images": len(ranks),
            "classes": n_classes,
            "skipped": n_skipped,
        },
        digest=context.digest(
            pictures, data.train.labels.tolist(), data.test.labels.tolist(), settings
        ),
    )
