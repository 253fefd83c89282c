"""Which tower passes first in forward and in backward.

Pictures first, texts after them, and backward the other way round: seeds, the buckets in which
ranks exchange gradients, and with both the bits of a run follow that order. Where the texts are
wanted early, they pass first in forward alone: `Draws` says whether random numbers stay the same,
and `after_texts` keeps the order of backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlp.models.trunk_features import Passed


class Draws:
    """Which sides of a model draw random numbers while it trains, as its first pass shows.

    Only one side may, if texts are to pass first: two draw from one stream, and would get each
    other's numbers. All ranks find the same, since they run the same modules in the same mode. It
    holds across evaluations, in which nothing is looked at.
    """

    def __init__(self) -> None:
        self._by_side: dict[str, bool] = {}

    @property
    def allow_texts_first(self) -> bool:
        """Whether random numbers are the same with either side first; not before both passed."""
        return len(self._by_side) == 2 and not all(self._by_side.values())

    @contextmanager
    def watched(self, side: str, device: torch.device, training: bool) -> Iterator[None]:
        """Around the pass of a side, "image" or "text": look once whether it draws."""
        if not training or side in self._by_side:
            yield
            return

        before = _random_state(device)
        yield
        self._by_side[side] = _random_state(device) != before


def _random_state(device: torch.device) -> list[bytes]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))  # kept on the host, so nobody waits
    return [state.numpy().tobytes() for state in states]


def after_texts(passed: Passed) -> Passed:
    """What the image tower made, the same, but that backward enters the tower after all that was
    computed before it: after the text tower, which passed first.

    In the order of forward the large gradient of token embeddings would come last, with nothing
    left to hide its exchange; and DDP, which lays gradients out in the order of its first backward,
    would wait with all others for the texts' that lie before them.
    """
    tokens = None if passed.tokens is None else _late(passed.tokens)
    trunk = None if passed.trunk is None else _late(passed.trunk)
    return Passed(_late(passed.features), tokens, trunk)


def _late(value: Tensor) -> Tensor:
    if not value.requires_grad:
        return value

    # Autograd runs what is ready by number, the newest first, and every thread counts from 0: a
    # node made in a fresh one comes after all others. If torch changes that, backward is only in
    # another order.
    with ThreadPoolExecutor(max_workers=1) as fresh:
        return fresh.submit(_Same.apply, value).result()


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
