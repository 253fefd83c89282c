"""How often an item of a cluster is begun anew, whose processes are lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

TRIES = 4  # of an item whose process ends by itself, on a node that lives
# That are lost at one item. Where machines come and go, each may go with one; but an item may also
# take the memory of the whole machine, and would end one after another.
LOST_NODES = 16


@dataclass
class Task:
    """An item, and the nodes whose processes were lost at it, one after another."""

    item: Any
    lost_at: list[str] = field(default_factory=list)

    def may_be_hopeless(self) -> bool:
        """Whether it has been lost often enough to look which of the nodes live."""
        return len(self.lost_at) >= min(TRIES, LOST_NODES)

    def why_hopeless(self, living: Collection[str]) -> str:
        """Why it is not begun again, in words; empty where it is. `living`: the nodes of now, since
        a process may be missed before its node is.
        """
        n_alone = sum(node in living for node in self.lost_at)
        n_with_node = len(self.lost_at) - n_alone
        if n_alone >= TRIES:
            return (
                f"{n_alone} processes ended without a word at one shard, most often for want of "
                "memory; call again, with fewer --processes: what is finished stays"
            )
        if n_with_node >= LOST_NODES:
            return (
                f"{n_with_node} nodes were lost at one shard: it takes the memory of a whole "
                "machine, or longer than these nodes live; call again on larger ones, or ones that "
                "stay: what is finished stays"
            )
        return ""
