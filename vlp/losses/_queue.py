"""A queue of keys of earlier steps, as terms read it."""

from __future__ import annotations

from torch import Tensor

from vlp.pairwise import Pairs


def filled(queue: Tensor, n_rows: int, pairs: Pairs) -> Tensor:
    """The rows of a queue [Q, D] that hold a key, without gradient: those that are finite and not
    zeros.

    Raises ValueError for a queue that the rows of one step would overrun.
    """
    step = n_rows * pairs.backend.ranks.size
    if len(queue) < step:
        raise ValueError(
            f"a queue of {len(queue)} is smaller than the batch of {step}: raise its size to at least {step}"
        )
    queue = queue.detach()
    return queue[queue.any(1) & queue.isfinite().all(1)]
