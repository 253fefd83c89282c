"""Batches on their way to the device, beside what it computes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vlp.types import Batch


def copied(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`: its copies wait for no step, and the step for them on the device only.

    The host runs a step ahead of the device (vlp.verdict), so that what is copied now passes beside
    the step before. Only page-locked memory is copied so; the loader's is, and on a CPU nothing
    moves.
    """
    if device.type != "cuda":
        return batch.to(device)

    stream = _stream(device)
    with torch.cuda.stream(stream):
        moved = batch.to(device)

    # The memory belongs to the copies' stream: the allocator must not hand it out again before the
    # step, on another one, has read it.
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for name in moved.carries() - {"key"}:
        getattr(moved, name).record_stream(current)
    return moved


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
