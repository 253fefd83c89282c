"""What a checkpoint holds of a run, copied to the host: of several ranks each one's part."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vlp import config as configuration
from vlp.checkpoint import Contents
from vlp.config import Config
from vlp.data.loader import Loader
from vlp.engines.base import Named
from vlp.pretrained.runs import KINDS
from vlp.rendezvous import DECIDING
from vlp.training import Training

if TYPE_CHECKING:
    from vlp.losses import Table

DEALT_BYTES = 2**16  # of a tensor that every rank holds: from here on it is dealt


class Staging:
    """Copies of tensors on the host, in memory that is kept from save to save: page-locked for what
    lies on a GPU, so that the copy is as fast as the bus.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.tables: dict[str, int] = {}  # samples of those that are written in another shape

    def held(self, name: str, value: Tensor) -> Tensor | None:
        """What this process writes of a tensor, copied when `settle` returns; None: nothing."""
        return self.copy(name, value)

    def held_table(self, name: str, table: Table) -> Tensor:
        return self.copy(name, table.rows()[: table.samples])

    def settle(self) -> None:
        """Wait for the copies from a GPU."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def copy(self, name: str, value: Tensor) -> Tensor:
        value = value.detach()
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.buffers[name] = buffer
        return buffer.copy_(value, non_blocking=value.is_cuda)


class Dealt(Staging):
    """A rank's part: its shards of sharded tensors, and its share of those that all ranks hold."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.loads = [0] * self.size  # bytes of whole tensors by the rank that writes them

    def held(self, name: str, value: Tensor) -> Tensor | None:
        if isinstance(value, DTensor):
            return self._part(name, value.to_local(), value.placements, value.shape)

        # The first rank's: under DDP each rank's batch norms move by its own rows, and those of
        # the first go to all before the next step.
        if value.nbytes < DEALT_BYTES:
            return self.copy(name, value) if self.rank == 0 else None

        if value.ndim and len(value) >= self.size:
            chunks = value.chunk(self.size)
            own = chunks[self.rank] if self.rank < len(chunks) else value[:0]
            return self._part(name, own, (Shard(0),), value.shape)

        # Whole, by the rank that has least so far: all ranks see the same loads.
        owner = self.loads.index(min(self.loads))
        self.loads[owner] += value.nbytes
        return self.copy(name, value) if owner == self.rank else None

    def held_table(self, name: str, table: Table) -> Tensor:
        """Of [rows, W, c], whose rows one after another are the samples
        (vlp.pretrained.parts.Rows), this rank's [rows, 1, c].
        """
        self.tables[name] = table.samples
        own = table.rows().unsqueeze(1)
        whole_shape = torch.Size((len(own), self.size, own.shape[2]))
        return self._part(name, own, (Shard(1),), whole_shape)

    def settle(self) -> None:
        super().settle()
        self.loads = [0] * self.size

    def _part(self, name: str, own: Tensor, placements: Any, shape: torch.Size) -> DTensor:
        strides = torch.empty(shape, device="meta").stride()
        copied = self.copy(name, own)
        return DTensor.from_local(
            copied, self.mesh, placements, run_check=False, shape=shape, stride=strides
        )


def collect(config: Config, training: Training, loader: Loader, staging: Staging) -> Contents:
    """What a checkpoint of the step just done holds, on the host: of several ranks each one's part.
    Collective.
    """
    tensors = held(training, staging)
    state = {
        "step": training.step,
        "skipped": training.skipped,
        # What is made ahead, or was not trained on in the end, is made again.
        "loader": loader.state_dict(training.step),
        "versions": {name: version(name) for name in DECIDING},
        "tables": staging.tables,
    }
    return Contents(
        **tensors,
        state=state,
        config=configuration.dump(config),
        description=training.engine.description,
    )


def held(training: Training, staging: Staging) -> dict[str, dict[str, Tensor]]:
    """{kind: {name: tensor}} of what this process writes, on the host. Collective."""
    of_kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for full_name, value in named_tensors(training):
        kind, _, name = full_name.partition("/")
        own = staging.held(full_name, value)
        if own is not None:
            of_kinds[kind][name] = own
    for name, table in training.objective.tables():
        of_kinds["objective"][name] = staging.held_table(name, table)
    staging.settle()
    return of_kinds


def named_tensors(training: Training) -> Named:
    """Name, "KIND/NAME", and tensor of all that a checkpoint holds, without tables. Collective."""
    yield from training.engine.tensors()
    if training.teacher is not None:
        for name, value in training.teacher.tensors():
            yield f"teacher/{name}", value
    for name, value in training.objective.tensors():
        yield f"objective/{name}", value


def saved_bytes(training: Training) -> dict[str, int]:
    """{kind: bytes} of a whole checkpoint's tensors, which are nearly all of it. Collective."""
    sizes = dict.fromkeys(KINDS, 0)
    for name, value in named_tensors(training):
        sizes[name.partition("/")[0]] += value.numel() * value.element_size()
    for _, table in training.objective.tables():
        sizes["objective"] += table.samples * table.own[:1].nbytes
    return sizes
