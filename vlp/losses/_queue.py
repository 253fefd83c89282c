"""A queue of keys of earlier steps, as terms read it."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp.pairwise import Pairs


def filled(queue: Tensor, n_rows: int, pairs: Pairs) -> Tensor:
    """The rows of a queue [Q, D] that hold a key, without gradient.

    Those that are finite and not zeros. Raises ValueError as `keys` does.
    """
    rows, holds_key = keys(queue, n_rows, pairs)
    return rows[holds_key]


def keys(queue: Tensor, n_rows: int, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """A queue [Q, D] without gradient, zeros where it holds no key; and which rows hold one, [Q].

    Raises ValueError for a queue that the rows of one step would overrun.
    """
    step = n_rows * pairs.backend.ranks.size
    if len(queue) < step:
        raise ValueError(
            f"a queue of {len(queue)} is smaller than the batch of {step}: raise its size to at "
            f"least {step}"
        )

    # Rows that are still empty, or came from a step that was not finite, hold no key.
    queue = queue.detach()
    holds_key = queue.any(1) & queue.isfinite().all(1)
    return torch.where(holds_key.unsqueeze(1), queue, 0), holds_key
