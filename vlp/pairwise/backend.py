"""How pairwise reductions are computed, and which ranks share candidates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from vlp import dist
from vlp.pairwise import tiled
from vlp.pairwise.execution import Execution
from vlp.pairwise.reduction import Block
from vlp.pairwise.topology import Partition, Topology

IMPLEMENTATIONS = ("auto", "dense", "tiled", "triton")


@dataclass(frozen=True)
class Backend:
    """How pairwise reductions are computed.

    topology: which ranks share candidates. impl: `dense` (reference), `tiled` (any device),
    `triton` (CUDA), `auto`. memory_budget: bytes for score tiles kept from forward, which then need
    no recomputation; None: twice the candidates' embeddings, so that memory stays O(n·D).
    texts_apart: texts that travel while a tower computes get a communicator of their own where they
    would share the world's; for models whose weights travel there at the same time.

    Collective over all ranks of the run: groups get their communicators here, and none later.
    Raises ValueError, naming what is valid, for a group size that does not divide the ranks, an
    unknown impl, or one that this machine cannot run.
    """

    ranks: dist.Group = field(default_factory=dist.world)
    topology: Topology = field(default_factory=Topology)
    impl: str = "auto"
    memory_budget: int | None = None
    tile_size: int = 0  # 0: the device's default
    seed: int = 0  # of alternating groups
    texts_apart: bool = False
    # the group of a fixed layout, by its partition: kept, so that a copy makes no new one
    _fixed: dict[Partition, dist.Group] = field(default_factory=dict, repr=False, compare=False)
    # one group, or none; kept likewise
    _apart: list[dist.Group] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: found {self.impl!r}; choose from {', '.join(IMPLEMENTATIONS)}")

        # Both raise for what cannot run: better now than at the first step.
        if self.impl == "triton":
            _triton_or_explain()
        self.topology.group_size(self.ranks.size)
        self._make_group()

        # A ring gathers nothing, and smaller groups are apart already or have no communicator.
        gathers = self.topology.exchange == "gather" and self.group_size > 1
        of_world = self.group().ranks == dist.world().ranks
        if self.texts_apart and gathers and of_world and not self._apart:
            self._apart.append(dist.apart())

    @property
    def group_size(self) -> int:
        """g, the ranks that share candidates."""
        return self.topology.group_size(self.ranks.size)

    def group(self, step: int = 0) -> dist.Group:
        """The ranks that share candidates with this one at this step."""
        # Every rank derives the same partition, so that members meet in the same call.
        partition = self.topology.partition(self.ranks.size, step, self.seed)
        if partition in self._fixed:
            return self._fixed[partition]
        positions = next(members for members in partition if self.ranks.index in members)
        return dist.within(self.ranks, positions)

    def group_of_texts(self, step: int = 0) -> dist.Group:
        """The same ranks, for texts that travel while a tower computes."""
        return self._apart[0] if self._apart else self.group(step)

    def _make_group(self) -> None:
        """Make the communicators of a fixed layout, on all ranks at once.

        Groups that alternate have none: a cycle at W = 2,048, g = 8 would need 511 of them on
        every rank. Neither have those inside a caller's group, whose other ranks are not here.
        """
        fixed = self.topology.layout != "alternating"
        is_part = 1 < self.group_size < self.ranks.size
        of_world = self.ranks.ranks == dist.world().ranks
        if not (fixed and is_part and of_world):
            return

        partition = self.topology.partition(self.ranks.size)
        if partition not in self._fixed:
            self._fixed[partition] = dist.split(partition)

    def execution(self, group: dist.Group, block: Block) -> Execution:
        """How this block is reduced over the candidates of `group`."""
        budget = self.memory_budget
        if budget is None:
            # A matrix that appears twice is gathered once.
            distinct_columns = {id(matrix): matrix.nbytes for matrix in block.right}
            budget = 2 * group.size * sum(distinct_columns.values())

        ring = self.topology.exchange == "ring"
        return Execution(group, ring, self._implementation(block), budget, self.tile_size)

    def _implementation(self, block: Block) -> Any:
        """The module that computes; None is the dense reference."""
        if self.impl == "dense":
            return None

        # auto: the kernels for the inputs they are made for, the tiled path elsewhere.
        device, dtype = block.left[0].device.type, block.left[0].dtype
        half_on_cuda = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
        pays = self.impl == "auto" and half_on_cuda and _has_triton()
        if self.impl == "triton" or pays:
            return _triton_or_explain()
        return tiled


def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _triton_or_explain() -> Any:
    if not _has_triton():
        raise ValueError(
            "impl: 'triton' needs the package triton, which is not installed; choose auto, tiled "
            "or dense"
        )
    # Imported late: its first lines need the package.
    from vlp.pairwise import triton

    triton.check_device()
    return triton
