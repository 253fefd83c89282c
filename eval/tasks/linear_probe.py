"""Linear probe: logistic regression on image embeddings by L-BFGS (Radford et al. 2021, appendix
A.3).

The decay is chosen from a grid on a fifth of the training images, held out class by class, and the
regression is then fitted again on all of them. Features are the unit embeddings in the shared
space, or what its projection reads, times √D so that the grid means the same at any width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vlp.eval import probes
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, _labelled, zeroshot
from vlp.eval.unprojected import unprojected

VERSION = 2  # 1 saw transparency on black, and pictures unturned
KNOWN_AS = "linear_probe_lbfgs"  # clip_benchmark's linear_probe is clip_benchmark_probe
MAIN = "acc1"
SCORES = ("acc1", "acc5", "mean_per_class_recall", "decay")
HELD_OUT_EVERY = 5  # of each class, the images that choose the decay


@dataclass(frozen=True)
class Options(_labelled.Options):
    """Which labelled set, and the grid."""

    # λ of λ/2‖W‖²
    decays: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    max_iterations: int = 300  # of L-BFGS, a fit
    # of the shared space, or before the projection into it
    features: Literal["projected", "unprojected"] = "projected"

    def __post_init__(self) -> None:
        if not self.decays or min(self.decays) <= 0:
            raise ValueError(f"decays are {self.decays}; expected positive numbers")


def read(options: Options) -> _labelled.Splits:
    """The training and the test split; a DataError where no decay could be chosen."""
    data = _labelled.read(options)
    most = int(torch.bincount(data.train.labels).max())
    if len(options.decays) > 1 and most < HELD_OUT_EVERY:
        raise DataError(
            f"no class of {options.data} has {HELD_OUT_EVERY} training images (the largest has "
            f"{most}), of which one would choose the decay; give one decay: decays=[0.01]"
        )
    return data


def run(encoder: Encoder, data: _labelled.Splits, options: Options, context: Context) -> TaskResult:
    """Choose the decay, fit on the training split, rank the classes of the test split."""
    if options.features == "unprojected":
        encoder = unprojected(encoder)
    train = _features(encoder, data.train, context)
    test = _features(encoder, data.test, context)
    labels, n_classes = data.train.labels, len(data.test.classes)

    # One decay leaves nothing to choose, and saves the fits.
    if len(options.decays) == 1:
        decay = options.decays[0]
    else:
        decay = choose(train, labels, n_classes, options)

    # With the decay chosen, all training images are fitted.
    weight, bias = probes.logistic_regression(
        train, labels, n_classes, decay, options.max_iterations
    )
    ranks = _ranks(test, data.test.labels, weight, bias)
    result = _labelled.result(ranks, data, context)
    result.values["decay"] = decay
    return result


def _features(encoder: Encoder, data: zeroshot.Data, context: Context) -> Tensor:
    """[n, D] rows of length √D."""
    rows = _labelled.embedded(encoder, data, context)
    return rows * rows.shape[1] ** 0.5


def choose(train: Tensor, labels: Tensor, n_classes: int, options: Options) -> float:
    """The decay with the best accuracy on every fifth image of each class; the larger of equals."""
    # Class by class, so that none lacks training or held-out images by chance.
    position = torch.zeros_like(labels)  # of an image among those of its class
    for number in range(n_classes):
        of_class = labels == number
        position[of_class] = torch.arange(int(of_class.sum()))
    held_out = position % HELD_OUT_EVERY == HELD_OUT_EVERY - 1

    accuracies = {}
    for decay in options.decays:
        weight, bias = probes.logistic_regression(
            train[~held_out], labels[~held_out], n_classes, decay, options.max_iterations
        )
        ranks = _ranks(train[held_out], labels[held_out], weight, bias)
        accuracies[decay] = float((ranks == 1).double().mean())

    def accuracy_then_decay(decay: float) -> tuple[float, float]:
        return accuracies[decay], decay

    return max(accuracies, key=accuracy_then_decay)


def _ranks(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[n] rank of the right class among the logits; a tie counts against it."""
    logits = rows.double() @ weight.T + bias
    return (logits >= logits.gather(1, labels[:, None])).sum(1)
