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

from vlp.eval import probes
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, _labelled, zeroshot
from vlp.eval.unprojected import unprojected

VERSION = 1
KNOWN_AS = "linear_probe"
MAIN = "lp_acc1"


@dataclass(frozen=True)
class Options(_labelled.Options):
    """Which labelled set, and how the layer is fitted."""

    val_split: str | None = None  # by which the decay is chosen
    val_proportion: float | None = None  # instead, this share of the training images
    shots: int | None = None  # training images a class; None: all
    # of the shared space, or before the projection into it
    features: Literal["projected", "unprojected"] = "projected"
    epochs: int = 10  # passes over the training images
    learning_rate: float = 0.1  # at the start
    batch: int = 64  # images a step
    seed: int = 0  # of the layer's start and of the order of images

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
    fitted: Tensor  # [n] places of the training images that the layer is fitted to, in their order
    held_out: Tensor  # [h] places of those by which the decay is chosen


def read(options: Options) -> Data:
    """All splits, and which training images are for what: that depends on labels and seed alone."""
    splits = _labelled.read(options)
    validation = None
    if options.val_split is not None:
        others = {options.train_split: splits.train, options.split: splits.test}
        validation = _labelled.one(options, options.val_split, others)
    return Data(splits, validation, *_divided(splits.train, options))


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """Accuracies of the layer on the test split, and the decay that was chosen."""
    if options.features == "unprojected":
        encoder = unprojected(encoder)
    splits = data.splits
    features, labels = _labelled.embedded(encoder, splits.train, context), splits.train.labels
    train = (features[data.fitted], labels[data.fitted])
    validation = None
    if data.validation is not None:
        rows = _labelled.embedded(encoder, data.validation, context)
        validation = (rows, data.validation.labels)
    elif len(data.held_out):
        validation = (features[data.held_out], labels[data.held_out])

    weight, bias, decay = _fitted(train, validation, options)
    # A class without training images has no row of the layer, and is never the answer.
    n_untrained = max(0, len(splits.test.classes) - len(bias))
    weight = torch.nn.functional.pad(weight, (0, 0, 0, n_untrained))
    bias = torch.nn.functional.pad(bias, (0, n_untrained), value=-torch.inf)
    ranks = probes.ranks(
        _labelled.embedded(encoder, splits.test, context), splits.test.labels, weight, bias
    )
    result = _labelled.result(ranks, splits, context, *_annotated(data.validation, context))
    result.items = {f"lp_{name}": items for name, items in result.items.items()}
    result.chance = {f"lp_{name}": chance for name, chance in result.chance.items()}
    result.values["weight_decay"] = decay
    return result


Rows = tuple[Tensor, Tensor]  # features [n, D] and labels [n]


def _annotated(validation: zeroshot.Data | None, context: Context) -> list[str]:
    """The hash of the images that choose the decay, where they are a split of their own."""
    if validation is None:
        return []
    pictures = [record.picture for record in validation.source.records]
    return [context.digest(pictures, validation.labels.tolist())]


def _divided(train: zeroshot.Data, options: Options) -> tuple[Tensor, Tensor]:
    """Places of the training images to fit to, in a drawn order and `shots` of each class, and of
    the share for validation.
    """
    n = len(train.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(options.seed))
    n_held_out = 0
    if options.val_proportion is not None:
        n_held_out = round(options.val_proportion * n)
        if not 0 < n_held_out < n:
            raise DataError(
                f"val_proportion={options.val_proportion} of {n} training images is {n_held_out}; "
                f"expected at least one of them, and one to fit to"
            )

    held_out, order = order[:n_held_out], order[n_held_out:]
    if options.shots is not None:
        order = _first_of_each(order, train, options.shots)
    return order, held_out


def _first_of_each(order: Tensor, train: zeroshot.Data, shots: int) -> Tensor:
    """The first `shots` of each class in this order; a DataError for a class with fewer."""
    kept = []
    for number in train.labels.unique():
        of_class = order[train.labels[order] == number]
        if len(of_class) < shots:
            raise DataError(
                f"class {train.classes[int(number)]!r} has {len(of_class)} training images, fewer "
                f"than shots={shots}; ask for fewer"
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
