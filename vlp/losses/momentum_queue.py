"""Contrast with a queue: candidates are embeddings that the moving average made in earlier steps.

    L = ½ mean_i [ CE([x_i·t̄_i ; x_i·Q_text]/τ, 0) + CE([t_i·x̄_i ; t_i·Q_image]/τ, 0) ]

x, t: [b, D] images and texts; x̄, t̄: [b, D] the same by the moving average, without gradient; Q:
[Q, D] keys of earlier steps, rows of zeros being empty.

Relations:
- as `infonce` with the queue for candidates; the other pairs of the batch are none
- `mixing` adds the queue to the batch's candidates, and mixtures of its hardest
- BriVL sums the directions, which is weight 2 here

Papers:
- BriVL (arXiv 2103.06561), with `teacher: {ema: 0.99, queue: Q}`:
  `objective: {momentum_queue: {temperature: 0.07, weight: 2}}`
- MoCo (arXiv 1911.05722) is the same within one modality

Needs: image, text, ema_image, ema_text, queue_image, queue_text

Cost: b·Q scores a direction, nothing sent between ranks; O((b + Q)·D) memory, and one forward pass
more of the average

Use: where memory allows few rows a step, and a queue must give the candidates
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._queue import filled
from vlp.pairwise import Pairs, softplus, widened

NEEDS = frozenset({"image", "text", "ema_image", "ema_text", "queue_image", "queue_text"})


@dataclass(frozen=True)
class Options:
    temperature: float = 0.07  # τ

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    """This rank's share of L."""
    # Images look for texts in the texts' queue, and the other way round.
    scale = 1 / options.temperature
    rows = direction(inputs.image, inputs.ema_text, inputs.queue_text, scale, pairs)
    columns = direction(inputs.text, inputs.ema_image, inputs.queue_image, scale, pairs)
    return pairs.mean(rows + columns) / 2


def direction(
    query: Tensor,  # [b, D]
    key: Tensor,  # [b, D], the moving average's embeddings of the other modality
    queue: Tensor,  # [Q, D]
    scale: float,
    pairs: Pairs,
) -> Tensor:
    """Cross-entropy of each row, [b]."""
    # The row's own key is the positive; only keys of the queue compete with it.
    positive = scale * (widened(query) * widened(key.detach())).sum(1)
    others = pairs.alone.row_logsumexp(query, filled(queue, len(query), pairs), scale)
    return softplus(others - positive)
