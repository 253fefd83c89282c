"""Linear probe: logistic regression on image embeddings by L-BFGS (Radford et al. 2021, appendix
A.3).

The decay is chosen from a grid on a fifth of the training images, held out class by class, and the
regression is then fitted again on all of them. Features are the unit embeddings in the shared
space, times √D so that the grid means the same at any width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from vlp.data.tables import TableOptions
from vlp.eval import embed, metrics
from vlp.eval.tasks import TaskResult, _labelled

VERSION = 1
KNOWN_AS = "linear_probe"


@dataclass(frozen=True)
class Options(TableOptions):
    """Which labelled set, and the grid."""

    data: str  # as for zeroshot, with both splits
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # whose images are classified
    train_split: str = "train"  # on which the classifier is fitted
    decays: list[float] = field(
        default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    )  # λ of λ/2‖W‖²
    max_iterations: int = 300  # of L-BFGS for one decay
    missing: Literal["error", "skip"] = "error"  # annotations without their image

    def __post_init__(self) -> None:
        if not self.decays or min(self.decays) <= 0:
            raise ValueError(f"decays are {self.decays}; expected positive numbers")


def read(options: Options) -> _labelled.Splits:
    return _labelled.read(options)


def run(
    encoder: Any, data: _labelled.Splits, options: Options, context: embed.Context
) -> TaskResult:
    train, test = (_labelled.embedded(encoder, part, context) for part in (data.train, data.test))
    train, test = (rows * rows.shape[1] ** 0.5 for rows in (train, test))
    labels, n_classes = data.train.labels, len(data.test.classes)
    decay = (
        options.decays[0] if len(options.decays) == 1 else choose(train, labels, n_classes, options)
    )
    ranks = _ranks(
        test,
        data.test.labels,
        *metrics.logistic_regression(train, labels, n_classes, decay, options.max_iterations),
    )
    result = _labelled.result(ranks, data, context, options.decays)
    result.values["decay"] = decay
    return result


def choose(train: Tensor, labels: Tensor, n_classes: int, options: Options) -> float:
    """The decay with the best accuracy on every fifth image of each class; the larger of equals."""
    position = torch.zeros_like(labels)
    for c in range(n_classes):
        own = labels == c
        position[own] = torch.arange(int(own.sum()))
    held = position % 5 == 4
    scores = {}
    for decay in options.decays:
        fitted = metrics.logistic_regression(
            train[~held], labels[~held], n_classes, decay, options.max_iterations
        )
        scores[decay] = float((_ranks(train[held], labels[held], *fitted) == 1).double().mean())
    return max(scores, key=lambda d: (scores[d], d))


def _ranks(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = rows.double() @ weight.T + bias
    return (logits >= logits.gather(1, labels[:, None])).sum(1)
