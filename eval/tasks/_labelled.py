"""What the probes share: two splits of a labelled set with the same classes, embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import choices, embed, metrics
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, shared, zeroshot


@dataclass(frozen=True, kw_only=True)
class Options(TableOptions):
    """Which labelled set, and its splits."""

    data: str  # as for zeroshot, with all splits
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # whose images are classified
    train_split: str = "train"  # from whose images is learnt
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass
class Splits:
    """A set to learn from and a set to be tested on."""

    train: zeroshot.Data
    test: zeroshot.Data


def read(options: Options) -> Splits:
    """Open both, as the options of a probe say."""
    test = one(options, options.split)
    return Splits(one(options, options.train_split, {options.split: test}), test)


def one(
    options: Options, split: str, others: Mapping[str, zeroshot.Data] | None = None
) -> zeroshot.Data:
    """One split as zero-shot classification reads it; a DataError where it does not go with the
    others: each has the same classes and pictures of its own.
    """
    data = zeroshot.read(shared(zeroshot.Options, options, split=split, partial=True))
    if data.labels.ndim == 2:
        raise DataError(f"{options.data} has several labels an image; probes need one")

    pictures = {record.picture for record in data.source.records}
    for name, other in (others or {}).items():
        names = f"splits {split!r} and {name!r} of {options.data}"
        # A class's number must mean the same in both.
        if data.classes != other.classes:
            in_one_only = sorted(set(data.classes) ^ set(other.classes))
            differing = ", ".join(in_one_only[:5]) or "in another order"
            raise DataError(f"{names} have different classes: {differing}")
        # A picture in both splits would be its own nearest neighbour.
        common = [r.picture.name for r in other.source.records if r.picture in pictures]
        if common:
            raise DataError(
                f"{names} share pictures ({len(common)}, e.g. {common[0]}); give separate splits"
            )
    return data


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
