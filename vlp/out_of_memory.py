"""Too little memory for a step: which settings to change, with the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlp import dist
from vlp.config import Train

# torch has an error class of its own for devices; the CPU's allocator has only its words.
_OF_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
_GIB = 2**30


class OutOfMemory(RuntimeError):
    """A step does not fit the memory; says what to change."""

    def __init__(self, train: Train, error: str) -> None:
        rows = train.batch // dist.world_size()
        part = rows // train.micro_batches
        checkpointing = str(train.activation_checkpointing).lower()
        super().__init__(
            f"a step does not fit into the memory{_memory()}: {error.splitlines()[0]}\n"
            f"train.batch {train.batch} is {rows} rows a rank, embedded {part} at a time "
            f"(train.micro_batches {train.micro_batches}, activation_checkpointing "
            f"{checkpointing}).\n{_advice(train, rows, part)}"
        )


@contextmanager
def fitting(train: Train) -> Iterator[None]:
    """Around a step: raises OutOfMemory where torch finds too little of it, on device or host."""
    try:
        yield
    except RuntimeError as error:
        words = str(error)
        of_cpu = any(text in words for text in _OF_CPU)
        if not (of_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        raise OutOfMemory(train, words) from error


def _advice(train: Train, rows: int, part: int) -> str:
    """What to try, the cheapest first; the loss is the same in all but the last."""
    steps = []
    divisors = [n for n in range(train.micro_batches + 1, rows + 1) if rows % n == 0]
    if divisors:
        n = next((n for n in divisors if n >= 2 * train.micro_batches), divisors[-1])
        steps.append(
            f"train.micro_batches={n} (activations of {rows // n} rows instead of {part}, the same "
            f"loss, {_forward_share(n) - _forward_share(train.micro_batches):.0%} more work)"
        )
    if not train.activation_checkpointing:
        steps.append("train.activation_checkpointing=true (up to a third more work)")
    steps.append(f"a train.batch below {train.batch}, or more ranks (fewer candidates a row)")
    return "Try in this order: " + "; ".join(steps) + "."


def _forward_share(micro_batches: int) -> float:
    """The second forwards of a step, as a share of its forward and backward: (m − 1)/m · 1/3."""
    return (micro_batches - 1) / micro_batches / 3


def _memory() -> str:
    """How full this rank's device is, where there is one."""
    if not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info()
    allocated = torch.cuda.memory_allocated()
    return (
        f" ({allocated / _GIB:.1f} GiB allocated, {free / _GIB:.1f} GiB free of "
        f"{total / _GIB:.1f} GiB)"
    )
