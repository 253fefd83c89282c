"""Rows that every rank of a group is sent, and that may be on their way before a term asks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp import dist


@dataclass
class Arriving:
    """This rank's rows of one step, which the ranks of a group exchange once, however many terms
    gather them.

    Known by the object `rows`: a copy, a part or a wider form of them is none of them, and is
    exchanged when it is asked for.
    """

    rows: Tensor  # [b, ...]
    group: dist.Group
    begun: dist.Gathering | None = None  # None: begun by whoever asks first
    is_asked_for: bool = False

    def gather(self, values: Tensor, group: dist.Group) -> Tensor:
        """`dist.all_gather` of any values, by what is on its way where they are these rows.

        Each call has a gradient of its own, so that a step's gradients are those of as many
        exchanges, bit for bit.
        """
        if values is not self.rows or group != self.group or group.size == 1:
            return dist.all_gather(values, group)

        self.is_asked_for = True
        if self.begun is None:
            self.begun = dist.Gathering(values, group)
        return dist.all_gather(values, group, self.begun)

    def settle(self) -> None:
        """Wait for what nobody asked for, and let go of the rows of all ranks, which only their
        readers hold from here on.
        """
        if self.begun is not None:
            self.begun.wait()
        self.begun = None
