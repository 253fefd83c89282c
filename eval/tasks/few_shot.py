"""Few-shot probe that starts at the zero-shot classifier (DiHT).

For k images a class: W minimises mean cross-entropy + λ/2‖W − W₀‖² on unit image embeddings, with
W₀ = scale · class embeddings of zero-shot classification, so that no images, or λ → ∞, are the
zero-shot accuracy. λ is the one of the grid with the best accuracy over two folds of the k images a
class (k = 1: the largest).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlp.eval import choices, probes
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, _labelled, zeroshot

VERSION = 1
KNOWN_AS = "few_shot"
MAIN = "acc1_16_shots"


@dataclass(frozen=True)
class Options(_labelled.Options):
    """Which labelled set, how many images a class, and the grid."""

    classes: str | list[str] | None = None  # as for zeroshot
    templates: str | list[str] | dict[str, list[str]] | None = None  # as for zeroshot
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])  # images a class
    decays: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])  # λ
    seed: int = 0  # of the draw

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or not self.decays or min(self.decays) <= 0:
            raise ValueError("shots and decays must be lists of positive numbers")


def read(options: Options) -> _labelled.Splits:
    """Both splits; a DataError where a class has fewer training images than are asked for."""
    data = _labelled.read(options)
    n_classes = len(data.train.classes)
    fewest = int(torch.bincount(data.train.labels, minlength=n_classes).min())
    if fewest < max(options.shots):
        raise DataError(
            f"a class of {options.data} has {fewest} training images, fewer than "
            f"shots={max(options.shots)}; ask for fewer: shots=[1, 2]"
        )
    return data


def run(encoder: Encoder, data: _labelled.Splits, options: Options, context: Context) -> TaskResult:
    """The accuracy without images, and after each number of shots."""
    train = _labelled.embedded(encoder, data.train, context).double()
    test = _labelled.embedded(encoder, data.test, context).double()
    templates, names = data.test.templates, data.test.classes
    class_rows = zeroshot.class_embeddings(encoder, templates, names, context)
    start = encoder.scale * class_rows.double()

    def accuracy_items(weight: Tensor, bias: Tensor) -> Tensor:
        return choices.accuracy(probes.ranks(test, data.test.labels, weight, bias) == 1)

    zero_shot = accuracy_items(start, torch.zeros(len(start), dtype=torch.float64))
    result = _labelled.result(torch.ones(len(test)), data, context, names, templates)
    result.items = {"acc1_0_shots": zero_shot}
    places = _drawn(data.train.labels, max(options.shots), options.seed)
    for shots in options.shots:
        chosen = places[:, :shots].flatten()
        rows, labels = train[chosen], data.train.labels[chosen]
        decay = _decay(rows, labels, start, shots, options.decays)
        layer = probes.logistic_regression(rows, labels, len(start), decay, start=start)
        result.items[f"acc1_{shots}_shots"] = accuracy_items(*layer)
        result.values[f"decay_{shots}_shots"] = decay
    result.chance = dict.fromkeys(result.items, 1 / len(start))
    return result


def _drawn(labels: Tensor, shots: int, seed: int) -> Tensor:
    """[C, shots] places of drawn images, class by class; fewer shots are the first of them."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.stack([order[labels[order] == c][:shots] for c in range(int(labels.max()) + 1)])


def _decay(rows: Tensor, labels: Tensor, start: Tensor, shots: int, decays: list[float]) -> float:
    """The λ that serves held-out images best; of equals the largest."""
    largest_first = sorted(decays, reverse=True)
    if shots == 1 or len(decays) == 1:
        return largest_first[0]

    # Every second image of a class: both folds have all classes.
    fold = torch.arange(len(labels)) % shots % 2
    best_decay, best_hits = largest_first[0], -1
    for decay in largest_first:
        n_hits = 0
        for held_out in (0, 1):
            is_known = fold != held_out
            known, new = (rows[is_known], labels[is_known]), (rows[~is_known], labels[~is_known])
            layer = probes.logistic_regression(*known, len(start), decay, start=start)
            n_hits += int((probes.ranks(*new, *layer) == 1).sum())
        if n_hits > best_hits:
            best_decay, best_hits = decay, n_hits
    return best_decay
