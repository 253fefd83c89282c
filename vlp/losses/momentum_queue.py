"""Contrast with a queue of the moving average's embeddings (BriVL, arXiv 2103.06561; MoCo, arXiv
1911.05722).

    L = ½ mean_i [ CE([x_i·t̄_i ; x_i·Q_text]/τ, 0) + CE([t_i·x̄_i ; t_i·Q_image]/τ, 0) ]

x̄, t̄: [b, D] embeddings of the moving average, without gradient; Q: [Q, D] those of earlier steps,
rows of zeros being empty. The other pairs of the batch are no candidates. BriVL sums the
directions, which is weight 2 here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses._queue import filled
from vlp.pairwise import Pairs, softplus

NEEDS = frozenset({"image", "text", "ema_image", "ema_text", "queue_image", "queue_text"})


@dataclass(frozen=True)
class Options:
    temperature: float = 0.07  # τ

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: found {self.temperature}, expected a number > 0")


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    scale = 1 / options.temperature
    rows = direction(inputs.image, inputs.ema_text, inputs.queue_text, scale, pairs)
    columns = direction(inputs.text, inputs.ema_image, inputs.queue_image, scale, pairs)
    return pairs.mean(rows + columns) / 2


def direction(query: Tensor, key: Tensor, queue: Tensor, scale: float, pairs: Pairs) -> Tensor:
    """Cross-entropy of each row, [b]."""
    positive = scale * (query * key.detach()).sum(1)
    return softplus(
        pairs.alone.row_logsumexp(query, filled(queue, len(query), pairs), scale) - positive
    )
