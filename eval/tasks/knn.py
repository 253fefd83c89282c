"""k nearest neighbours on image embeddings: the training images vote, weighted by e^{cos/T} (Wu et
al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

from vlp.eval import metrics
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.tasks import TaskResult, _labelled

VERSION = 2  # 1 saw transparency on black, and pictures unturned
KNOWN_AS = "knn"
MAIN = "acc1"
SCORES = ("acc1", "acc5", "mean_per_class_recall")


@dataclass(frozen=True)
class Options(_labelled.Options):
    """Which labelled set, and how many neighbours."""

    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # T of the votes' weights

    def __post_init__(self) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(
                f"k is {self.k} and temperature {self.temperature}; "
                "expected k >= 1 and temperature > 0"
            )


def read(options: Options) -> _labelled.Splits:
    """The training and the test split."""
    return _labelled.read(options)


def run(encoder: Encoder, data: _labelled.Splits, options: Options, context: Context) -> TaskResult:
    """Ranks of the right classes by the vote of the nearest training images."""
    # Training images vote, test images are asked.
    bank = _labelled.embedded(encoder, data.train, context)
    queries = _labelled.embedded(encoder, data.test, context)
    ranks = metrics.nearest_neighbour_ranks(
        queries,
        bank,
        data.train.labels,
        data.test.labels,
        len(data.test.classes),
        options.k,
        options.temperature,
    )
    return _labelled.result(ranks, data, context)
