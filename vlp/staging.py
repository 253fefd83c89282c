"""What a checkpoint holds of a run, copied to the host: of several ranks each one's part.

    contents = collect(training, loader, staging)   between two steps: says what is to be copied
    staging.settle()                                beside the next step: copies it
    staging.wait()                                  before the next step's update

Between two updates weights, moments, averages and the state of terms keep their values, so that
training need not wait for their copies: these pass while the next step computes its gradients. What
moves before an update, like a batch norm's statistics, and what is made for the copy alone is
copied at once. From a GPU all copies are asked for at once and pass in the order of its stream.
"""

from __future__ import annotations

import functools
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from vlp.checkpoint import Contents
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
        self.pending: list[tuple[Tensor, Tensor]] = []  # copies to be made: to where, and of what
        self.copied = threading.Event()  # that none are
        self.copied.set()
        self.asked: Any = None  # an event of the GPU behind the last copy that was asked of it

    def held(self, name: str, value: Tensor, lasts: bool = False) -> Tensor | None:
        """What this process writes of a tensor, copied when `settle` returns; None: nothing.
        `lasts`: it keeps its values, and its memory, until `wait` is called.
        """
        return self.copy(name, value, lasts)

    def held_table(self, name: str, table: Table) -> Tensor:
        return self.copy(name, table.rows()[: table.samples], lasts=True)

    def begin(self) -> None:
        """Let the copies of another checkpoint follow, whatever has become of those before."""
        self.pending.clear()

    @torch.no_grad()
    def settle(self) -> None:
        """Make the copies that are left, and wait for those from a GPU. In any thread."""
        try:
            if self.pending:
                targets, sources = zip(*self.pending)
                # In one call, which leaves Python to the thread that trains.
                torch._foreach_copy_(list(targets), list(sources))
        finally:
            self.pending.clear()
            self.copied.set()

        # Of this no update need be told: it stands behind the copies in the GPU's own order.
        if self.asked is not None:
            self.asked.synchronize()

    def wait(self) -> None:
        """Return when nothing is read any more that the host may change."""
        self.copied.wait()

    def copy(self, name: str, value: Tensor, lasts: bool) -> Tensor:
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self.buffers[name] = buffer

        if lasts and not value.is_cuda:
            self.pending.append((buffer, value))
            return buffer
        return buffer.copy_(value.detach(), non_blocking=value.is_cuda)

    def mark(self) -> None:
        """Note behind which copies of the GPU `settle` waits."""
        if torch.cuda.is_available():
            self.asked = torch.cuda.Event()
            self.asked.record()


class Dealt(Staging):
    """A rank's part: its shards of sharded tensors, and its share of those that all ranks hold."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.rank, self.size = mesh.get_local_rank(), mesh.size()
        self.loads = [0] * self.size  # bytes of whole tensors by the rank that writes them
        # Buffers, and the same with their places in the whole tensors.
        self.parts: dict[str, tuple[Tensor, DTensor]] = {}

    def held(self, name: str, value: Tensor, lasts: bool = False) -> Tensor | None:
        if isinstance(value, DTensor):
            return self._part(name, value.to_local(), value.placements, value.shape, lasts)

        # The first rank's: under DDP each rank's batch norms move by its own rows, and those of
        # the first go to all before the next step.
        if value.nbytes < DEALT_BYTES:
            return self.copy(name, value, lasts) if self.rank == 0 else None

        if value.ndim and len(value) >= self.size:
            chunks = value.chunk(self.size)
            own = chunks[self.rank] if self.rank < len(chunks) else value[:0]
            return self._part(name, own, (Shard(0),), value.shape, lasts)

        # Whole, by the rank that has least so far: all ranks see the same loads.
        owner = self.loads.index(min(self.loads))
        self.loads[owner] += value.nbytes
        return self.copy(name, value, lasts) if owner == self.rank else None

    def held_table(self, name: str, table: Table) -> Tensor:
        """Of [rows, W, c], whose rows one after another are the samples
        (vlp.pretrained.parts.Rows), this rank's [rows, 1, c].
        """
        self.tables[name] = table.samples
        own = table.rows().unsqueeze(1)
        whole_shape = torch.Size((len(own), self.size, own.shape[2]))
        return self._part(name, own, (Shard(1),), whole_shape, lasts=True)

    def begin(self) -> None:
        super().begin()
        self.loads = [0] * self.size

    def _part(
        self, name: str, own: Tensor, placements: Any, shape: torch.Size, lasts: bool
    ) -> DTensor:
        buffer = self.copy(name, own, lasts)

        # Made once: it takes as long as copying a hundred kilobytes.
        if name in self.parts:
            earlier_buffer, part = self.parts[name]
            lies_alike = part.shape == shape and part.placements == tuple(placements)
            if earlier_buffer is buffer and lies_alike:
                return part

        strides = torch.empty(shape, device="meta").stride()
        part = DTensor.from_local(
            buffer, self.mesh, placements, run_check=False, shape=shape, stride=strides
        )
        self.parts[name] = (buffer, part)
        return part


def collect(training: Training, loader: Loader, staging: Staging) -> Contents:
    """What a checkpoint of the step just done holds, but for the configuration: its tensors are on
    the host when the staging is settled, of several ranks each one's part. Collective.
    """
    tensors = held(training, staging)
    state = {
        "step": training.step,
        "skipped": training.skipped,
        # What is made ahead, or was not trained on in the end, is made again.
        "loader": loader.state_dict(training.step),
        "versions": versions(),
        "tables": staging.tables,
    }
    return Contents(
        **tensors,
        state=state,
        config="",  # tens of milliseconds of Python: made beside the steps
        description=training.engine.description,
    )


@functools.cache
def versions() -> dict[str, str]:
    """Those of the packages that decide numbers, which are read from files."""
    return {name: version(name) for name in DECIDING}


@torch.no_grad()
def held(training: Training, staging: Staging) -> dict[str, dict[str, Tensor]]:
    """{kind: {name: tensor}} of what this process writes, on the host once the staging is settled.
    Collective.
    """
    staging.begin()
    of_kinds: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    for full_name, value in named_tensors(training):
        kind, _, name = full_name.partition("/")
        own = staging.held(full_name, value, lasts=lasts(training, full_name))
        if own is not None:
            of_kinds[kind][name] = own
    for name, table in training.objective.tables():
        of_kinds["objective"][name] = staging.held_table(name, table)
    staging.mark()
    return of_kinds


def lasts(training: Training, full_name: str) -> bool:
    """Whether a tensor of `named_tensors` keeps its values and its memory until the next update."""
    of_engine = full_name.startswith(("model/", "optimizer/"))
    # The state of terms and teachers moves after the update.
    return training.engine.lasts(full_name) if of_engine else True


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
