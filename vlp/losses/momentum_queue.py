"""Contrast with a queue: candidates are embeddings that the moving average made in earlier steps.

    L = ½ mean_i [ CE([x_i·t̄_i ; x_i·Q_text]/τ, 0) + CE([t_i·x̄_i ; t_i·Q_image]/τ, 0) ]

x, t: [b, D] images and texts; x̄, t̄: [b, D] the same by the moving average, without gradient; Q:
[Q, D] keys of earlier steps, rows of zeros being empty.

With `positives` the keys of the row's label, of `queue_label`: [Q], are positives too, by the form
of `infonce`. `ignore` leaves keys out: of the row's label, more than `margin` above the row's own
key, or (`queue`: ρ) with k_i·q >= ρ, where k_i is the row's own key. `hardest` keeps the k highest.

Relations:
- as `infonce` with the queue for candidates; the other pairs of the batch are none
- `mixing` adds the queue to the batch's candidates, and mixtures of its hardest
- BriVL sums the directions, which is weight 2 here

Papers:
- BriVL (arXiv 2103.06561), with `teacher: {ema: 0.99, queue: Q}`:
  `objective: {momentum_queue: {temperature: 0.07, weight: 2}}`
- MoCo (arXiv 1911.05722) is the same within one modality

Needs: image, text, ema_image, ema_text, queue_image, queue_text; with positives and
ignore.same_label label and queue_label

Cost: b·Q scores a direction, nothing sent between ranks; O((b + Q)·D) memory, and one forward pass
more of the average

Use: where memory allows few rows a step, and a queue must give the candidates
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vlp.losses import _masked
from vlp.losses._candidate_options import Formed
from vlp.losses._candidates import Chosen, absent, alike, below, beyond, same_as_key
from vlp.losses._inputs import Inputs
from vlp.losses._queue import keys
from vlp.pairwise import Pairs, softplus, widened

NEEDS = frozenset({"image", "text", "ema_image", "ema_text", "queue_image", "queue_text"})


@dataclass(frozen=True)
class Options(Formed):
    has_queue = True

    temperature: float = 0.07  # τ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")
        if self.within != "none" or self.ignore.teacher is not None or self.ignore.cluster:
            raise ValueError(
                "within, ignore.teacher and ignore.cluster: nothing of the kind is known of a "
                "queue's keys; use ignore.queue, ignore.margin or ignore.same_label, or infonce"
            )


def needs(options: Options) -> frozenset[str]:
    of_keys = frozenset({"queue_label"} if "label" in options.needs() else set())
    return NEEDS | options.needs() | of_keys


@dataclass(frozen=True)
class Side:
    """Rows of one modality and the keys of the other."""

    query: Tensor  # [b, D]
    key: Tensor  # [b, D], the moving average's embeddings, without gradient
    queue: Tensor  # [Q, D], zeros where it holds no key
    holds_key: Tensor  # [Q] bool


def exported_scale(options: Options) -> float:
    """1/τ."""
    return 1 / options.temperature


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    # Images look for texts in the texts' queue, and the other way round.
    inputs = inputs.operands()
    n_rows = len(inputs.image)
    sides = [
        Side(query, key.detach(), *keys(queue, n_rows, pairs))
        for query, key, queue in (
            (inputs.image, inputs.ema_text, inputs.queue_text),
            (inputs.text, inputs.ema_image, inputs.queue_image),
        )
    ]
    by_image, by_text = (
        [_plain(side, pairs, options) for side in sides]
        if options.plain
        else _masked_losses(inputs, sides, pairs, options)
    )
    return pairs.mean(by_image + by_text) / 2


def _plain(side: Side, pairs: Pairs, options: Options) -> Tensor:
    """Cross-entropy of each row, [b]."""
    # The row's own key is the positive; only keys of the queue compete with it.
    scale = 1 / options.temperature
    others = pairs.alone.row_logsumexp(side.query, side.queue, scale, valid=side.holds_key)
    return softplus(others - scale * _own_cosines(side))


def _masked_losses(
    inputs: Inputs, sides: list[Side], pairs: Pairs, options: Options
) -> list[Tensor]:
    """The losses of images and of texts, [b] each, where keys may be ignored or be positives."""
    scale, losses, statistics = 1 / options.temperature, [], []
    for side in sides:
        chosen, own = _chosen(inputs, side, pairs, options), scale * _own_cosines(side)
        values, statistic = _masked.of_queue(
            side.query, own, side.queue, scale, chosen, pairs, options
        )
        losses.append(values)
        statistics.append(statistic)

    _masked.note(pairs, options, statistics, [side.holds_key.sum() for side in sides])
    return losses


def _chosen(inputs: Inputs, side: Side, pairs: Pairs, options: Options) -> Chosen:
    """The rules of rows against the keys of a queue."""
    ignore, rules = options.ignore, [absent(side.holds_key)]
    if ignore.same_label:
        rules.append(same_as_key(inputs.label, inputs.queue_label, side.holds_key))
    if ignore.margin is not None:
        rules.append(beyond(_own_cosines(side).detach(), ignore.margin, None))
    if ignore.queue is not None:
        rules.append(alike(side.key, side.queue, ignore.queue))

    positives = None
    if options.positives != "none":
        positives = same_as_key(inputs.label, inputs.queue_label, side.holds_key)
    chosen = Chosen(positives, tuple(rules))
    if options.hardest is None or options.hardest >= len(side.queue):
        return chosen
    k = options.hardest
    threshold = chosen.threshold(pairs.alone, side.query, side.queue, k, paired=False)
    return replace(chosen, easy=below(threshold))


def _own_cosines(side: Side) -> Tensor:
    """Cosine of each row with its own key, [b]."""
    return (widened(side.query) * widened(side.key)).sum(1)
