"""What the ranks of a step tell each other, in one all-reduce, and what of it the host reads.

The host never waits for a step in its middle. Where anything is not finite, the device itself
leaves the update out; the host reads a step late, from page-locked memory, whether that happened:

    step s      agree → backward → update, guarded on the device → Readback starts
    step s + 1  … and at its end, while the device still computes, the answer of step s is read

It is the same on a CPU, where nothing is gained, so that the order of events is tested there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlp import dist


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks, and still on the device."""

    numbers: dict[str, Tensor]  # ∂total/∂number by name, the mean over ranks
    # [] 1.0 where all is finite on all ranks, else NaN. As a factor of what is backpropagated it
    # makes the norm of the gradient tell the whole story, so that one check guards the update.
    poison: Tensor
    n_stop: Tensor  # [] ranks that were asked to stop
    n_void: Tensor  # [] ranks that have no rows of their own


def agree(numbers: Mapping[str, Tensor], bad: Tensor, *, stop: bool, void: bool) -> Agreed:
    """Join what ranks have to know of each other. Collective: the one all-reduce of a step that is
    not the objective's or the engine's.

    numbers: this rank's ∂total/∂number, [] each; bad: [] bool, whether anything here is not finite.
    """
    dtype = torch.float32
    for gradient in numbers.values():
        dtype = torch.promote_types(dtype, gradient.dtype)

    # A rank without rows spoils the step like one with NaN: nothing may move.
    flags = [bad | void, torch.full_like(bad, stop), torch.full_like(bad, void)]
    packed = torch.stack([value.to(dtype) for value in (*numbers.values(), *flags)])
    *gradients, n_bad, n_stop, n_void = dist.all_reduce(packed, dist.world()).unbind()

    # A scale's ceiling looks at the sign of its gradient, which must be the ranks' common one.
    means = [gradient / dist.world_size() for gradient in gradients]
    poison = torch.where(n_bad > 0, torch.nan, torch.ones_like(n_bad))
    return Agreed(dict(zip(numbers, means)), poison, n_stop, n_void)


class Readback:
    """Numbers on their way from the device to the host, which goes on meanwhile."""

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._event: Any = None
        packed = torch.stack([number.detach().double() for number in numbers])
        if not packed.is_cuda:
            self._on_host = packed
            return

        # Only into page-locked memory does a GPU copy by itself.
        self._on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        self._on_host.copy_(packed, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list[float]:
        """Wait for them, if they are not here yet."""
        if self._event is not None:
            self._event.synchronize()
        return list(map(float, self._on_host.numpy()))


@dataclass(frozen=True)
class Verdict:
    """What a step came to, for the host to read when it has come."""

    step: int
    numbers: Readback  # the gradient's norm, n_stop, n_void
    bad_rows: Mapping[str, Tensor]  # as vlp.non_finite.bad_rows finds them; on the device
    sample_id: Tensor  # [b]
    keys: Sequence[str]  # of b rows
