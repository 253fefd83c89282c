"""clip_benchmark's linear probe: a linear layer on the image embeddings, ten epochs of AdamW.

With `val_split` or `val_proportion` the weight decay is searched among 97 by validation accuracy,
and the layer then fitted on training and validation images together; without, there is no decay.
From equal features follow clip_benchmark's numbers (`--no_amp`); it draws the order of the training
images, and the images of `val_proportion`, after loading the model, here they depend on `seed`
alone. Our own probe, fitted to its optimum, is `linear_probe`.

Source: LAION-AI/CLIP_benchmark@48de38c, `clip_benchmark/metrics/linear_probe.py`, after Radford et
al. 2021, appendix A.3, "instead of scikit-learn LBFGS use FCNNs with AdamW".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import probes
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, _labelled, zeroshot
from vlp.eval.unprojected import unprojected

VERSION = 1
KNOWN_AS = "linear_probe"
MAIN = "lp_acc1"
SCORES = ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "weight_decay")


@dataclass(frozen=True)
class Options(TableOptions):
    """Which labelled set, and how the layer is fitted."""

    data: str  # as for zeroshot, with all splits
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # whose images are classified
    train_split: str = "train"  # on which the layer is fitted
    val_split: str | None = None  # by which the decay is chosen
    val_proportion: float | None = None  # instead, this share of the training images
    shots: int | None = None  # training images a class; None: all
    # of the shared space, or before the projection into it
    features: Literal["projected", "unprojected"] = "projected"
    epochs: int = 10  # passes over the training images
    learning_rate: float = 0.1  # at the start
    batch: int = 64  # images a step
    seed: int = 0  # of the layer's start and of the order of images
    missing: Literal["error", "skip"] = "error"  # annotations without their image

    def __post_init__(self) -> None:
        if self.val_split is not None and self.val_proportion is not None:
            raise ValueError("val_split and val_proportion are both given; expected one of them")
        if self.val_proportion is not None and not 0 < self.val_proportion < 1:
            raise ValueError(f"val_proportion is {self.val_proportion}; expected 0 to 1")
        if min(self.epochs, self.batch, self.shots or 1) < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch, shots and learning_rate must be positive")


@dataclass
class Data:
    """The splits to learn from, to choose the decay by, and to be tested on."""

    splits: _labelled.Splits
    validation: zeroshot.Data | None


def read(options: Options) -> Data:
    """All splits, with the same classes."""
    splits = _labelled.read(options)
    if options.val_split is None:
        return Data(splits, None)

    validation = _labelled.one(options, options.val_split)
    if validation.classes != splits.test.classes:
        raise DataError(
            f"split {options.val_split!r} of {options.data} has other classes than the others"
        )
    return Data(splits, validation)


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracies of the layer on the test split, and the decay that was chosen."""
    if options.features == "unprojected":
        encoder = unprojected(encoder)
    splits = data.splits
    features = _labelled.embedded(encoder, splits.train, context)
    train, validation = _divided(features, splits.train.labels, options)
    if data.validation is not None:
        rows = _labelled.embedded(encoder, data.validation, context)
        validation = (rows, data.validation.labels)

    weight, bias, decay = _fitted(train, validation, options)
    # A class without training images has no row of the layer, and is never the answer.
    n_untrained = max(0, len(splits.test.classes) - len(bias))
    weight = torch.nn.functional.pad(weight, (0, 0, 0, n_untrained))
    bias = torch.nn.functional.pad(bias, (0, n_untrained), value=-torch.inf)
    ranks = probes.ranks(
        _labelled.embedded(encoder, splits.test, context), splits.test.labels, weight, bias
    )
    result = _labelled.result(ranks, splits, context, options.features, options.shots)
    result.items = {f"lp_{name}": items for name, items in result.items.items()}
    result.chance = {f"lp_{name}": chance for name, chance in result.chance.items()}
    result.values["weight_decay"] = decay
    return result


Rows = tuple[Tensor, Tensor]  # features [n, D] and labels [n]


def _divided(features: Tensor, labels: Tensor, options: Options) -> tuple[Rows, Rows | None]:
    """The training rows in a drawn order, `shots` of each class, and the share for validation."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(options.seed))
    held_out = None
    if options.val_proportion is not None:
        n_held_out = round(options.val_proportion * len(order))
        places, order = order[:n_held_out], order[n_held_out:]
        held_out = (features[places], labels[places])

    if options.shots is not None:
        order = _first_of_each(order, labels, options.shots)
    return (features[order], labels[order]), held_out


def _first_of_each(order: Tensor, labels: Tensor, shots: int) -> Tensor:
    """The first `shots` of each class in this order; a DataError for a class with fewer."""
    kept = []
    for number in labels.unique():
        of_class = order[labels[order] == number]
        if len(of_class) < shots:
            raise DataError(
                f"class {int(number)} has {len(of_class)} training images, fewer than shots={shots}"
            )
        kept.append(of_class[:shots])
    chosen = torch.cat(kept)
    return order[torch.isin(order, chosen)]


def _fitted(train: Rows, validation: Rows | None, options: Options) -> tuple[Tensor, Tensor, float]:
    """(weight, bias, decay) of the layer that is tested."""
    settings = probes.AdamW(options.epochs, options.learning_rate, options.batch, options.seed)
    n_classes = int(train[1].max()) + 1
    if validation is None:
        return (*probes.adamw_probe(*train, n_classes, 0.0, settings), 0.0)

    rows, labels = validation
    n_classes = max(n_classes, int(labels.max()) + 1)

    def accuracy(decay: float) -> float:
        layer = probes.adamw_probe(*train, n_classes, decay, settings)
        return float((probes.ranks(rows, labels, *layer) == 1).double().mean())

    decay = probes.swept_decay(accuracy)
    # Few shots stay few: validation images would be more of them.
    if options.shots is None:
        train = (torch.cat([train[0], rows]), torch.cat([train[1], labels]))
    return (*probes.adamw_probe(*train, n_classes, decay, settings), decay)
