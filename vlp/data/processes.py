"""The loader processes: how they are started, watched and ended, and the shared memory their
batches travel through.

They are forked from a server that only has the imports, since a fork of a process that has used
OpenMP, CUDA or threads can hang. So they are no children of the trainer: nothing tells it of their
death, and nothing tells them of its own. Both are asked for here: the trainer looks at them twice a
second while it waits, and each watches the trainer.
"""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vlp.data import server
from vlp.data.steps import DataError
from vlp.lifetime import end_with_parent

PREFETCH = 2  # items that each process makes ahead
_PART_BYTES = 32 << 20  # of a step's rows that one process makes alone
SHARED_MEMORY = Path("/dev/shm")
# Between two looks at the processes, and at whether the run was asked to stop.
_POLL_S = 0.5
_FAREWELL_S = 3.0  # from a failed exchange with a process until its death is known
_OPTIONS = "lower data.workers or train.batch, or decode in the training process: data.workers=0"


class Feed:
    """Items `start`, `start` + 1, … of `dataset`, without end, made by `n_workers` processes or in
    this one. `pin`: into page-locked memory, from which a GPU copies by itself.
    """

    def __init__(self, dataset: Dataset, start: int, n_workers: int, pin: bool = False) -> None:
        self._n_taken = 0
        options: dict[str, Any] = {"pin_memory": pin}
        if n_workers:
            # With a time-out torch looks at its processes each time it runs out, and gives control
            # back.
            options["timeout"] = _POLL_S
            options["prefetch_factor"] = PREFETCH
            options["worker_init_fn"] = _begin
            options["multiprocessing_context"] = torch.multiprocessing.get_context("forkserver")
            server.start()

        # torch neither draws nor batches: an item is a step, or a part of one.
        loader = DataLoader(
            _ErrorsAsItems(dataset),
            batch_size=None,
            sampler=_From(start),
            num_workers=n_workers,
            **options,
        )

        try:
            self._iterator = iter(loader)
        except (OSError, EOFError) as error:
            raise DataError(
                f"the loader processes cannot be started ({error}): is there memory left? "
                f"{_OPTIONS}"
            ) from error

    def poll(self) -> Any | None:
        """The next item, or None where none came for half a second. DataError for a process that
        died or could not go on.
        """
        try:
            item = next(self._iterator)
        except RuntimeError as error:
            # torch has no classes for these; their texts are all that tells them apart.
            message = str(error)
            if message.startswith("DataLoader timed out"):
                return None
            if message.startswith("DataLoader worker (pid"):
                raise DataError(self._death()) from error
            if message.startswith("Too many open files"):
                raise DataError(
                    "too many open files between the loader processes; "
                    "raise the limit: ulimit -n 65536"
                ) from error
            raise
        except (OSError, EOFError) as error:
            # A process that dies while its batch is being handed over shows as a broken connection.
            if not self._dead(_FAREWELL_S):
                raise
            raise DataError(self._death()) from error

        if isinstance(item, DataError):
            raise item
        self._n_taken += 1
        return item

    def _dead(self, timeout_s: float = 0) -> list[Any]:
        """Loader processes that have ended; waits for a first one."""
        # torch offers no way to ask for them.
        processes = self._iterator._workers  # type: ignore[attr-defined]  # torch's own name for them

        # A sentinel is ready once its process has ended: no look needs to be repeated.
        wait([process.sentinel for process in processes], timeout_s)
        return [process for process in processes if process.exitcode is not None]

    def _death(self) -> str:
        """What happened to the processes, and what to do."""
        codes = sorted({process.exitcode for process in self._dead(_FAREWELL_S)})
        death = "a loader process died"
        if not self._n_taken:
            death += " before its first batch"

        # A page of shared memory that cannot be had is a bus error where it is written.
        if -signal.SIGBUS in codes:
            return f"{death} of a bus error. {no_shared_memory()}"

        endings = " and ".join(_ending(code) for code in codes) or "it gave no exit code"
        if -signal.SIGKILL in codes:
            # What the kernel's out-of-memory killer sends.
            advice = f"most often for want of memory: give the job more, or {_OPTIONS}"
        else:
            advice = "what it printed stands above; data.workers=0 shows an error where it happens"
        return f"{death} ({endings}), {advice}"


def n_parts(batch_bytes: int, n_workers: int, n_rows: int) -> int:
    """How many processes make a step together: all, where whole batches ahead by each would take
    gigabytes, and one where they are small.
    """
    return max(1, min(-(-batch_bytes // _PART_BYTES), n_workers, n_rows))


def fitting_workers(
    batch_bytes: int, n_rows: int, wanted: int, n_ranks: int, folder: Path = SHARED_MEMORY
) -> int:
    """The largest number of loader processes a rank, from 1 to `wanted`, whose items the shared
    memory of this machine holds.
    """
    if not folder.is_dir():
        return wanted

    free = shutil.disk_usage(folder).free
    for n_workers in range(wanted, 1, -1):
        parts = n_parts(batch_bytes, n_workers, n_rows)
        if n_items_ahead(n_workers, parts, n_ranks) * batch_bytes / parts <= free:
            return n_workers
    return 1


def n_items_ahead(n_workers: int, parts: int, n_ranks: int) -> int:
    """Items that lie in shared memory at once: those made ahead, and those of the step that is
    being trained on or joined.
    """
    return n_ranks * (n_workers * PREFETCH + parts)


def check_shared_memory(
    batch_bytes: int, n_workers: int, n_ranks: int, folder: Path = SHARED_MEMORY, parts: int = 1
) -> None:
    """Raise DataError where the batches that are made ahead on this machine, each in `parts`, will
    not fit into its shared memory.
    """
    if not n_workers or not folder.is_dir():
        return

    # torch would notice only when the first batch is written, and then by a bus error.
    n_items = n_items_ahead(n_workers, parts, n_ranks)
    free = shutil.disk_usage(folder).free
    if n_items * batch_bytes / parts > free:
        raise DataError(no_shared_memory(n_items, batch_bytes // parts, folder))


def no_shared_memory(
    n_batches: int | None = None, batch_bytes: int = 0, folder: Path = SHARED_MEMORY
) -> str:
    """What to say of shared memory that is, or will be, full."""
    need = ""
    size = "8g"
    if n_batches is not None:
        need = f": {n_batches} batches of {megabytes(batch_bytes)} are made ahead"
        # Twice what is needed, for other processes of the machine use it too.
        size = f"{math.ceil(2 * n_batches * batch_bytes / 2**30)}g"

    left = ""
    if folder.is_dir():
        usage = shutil.disk_usage(folder)
        left = f" ({megabytes(usage.free)} free of {megabytes(usage.total)})"
    return (
        f"the shared memory {folder}{left} is too small for the loader processes{need}. "
        "Docker gives 64 MB unless told: "
        f"docker run --shm-size={size} (or --ipc=host); otherwise {_OPTIONS}"
    )


def megabytes(n: int) -> str:
    """A number of bytes for a person."""
    return f"{n / 1e6:,.0f} MB" if n >= 1e6 else f"{n / 1e3:,.0f} kB"


class _ErrorsAsItems(Dataset):
    """A data set whose DataErrors come as items: as exceptions they would arrive with a traceback
    for a message.
    """

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __getitem__(self, index: int) -> Any:
        try:
            item = self.inner[index]
            in_loader_process = torch.utils.data.get_worker_info() is not None
            if in_loader_process:
                _share(item)
            return item
        except DataError as error:
            return error
        except RuntimeError as error:
            if is_shared_memory(error):
                return DataError(no_shared_memory())
            raise


def is_shared_memory(error: Exception) -> bool:
    """Whether torch failed for want of shared memory."""
    return "shared memory" in str(error) or "torch_shm" in str(error)


def _share(item: Any) -> None:
    """Move an item's tensors to shared memory here, where a failure can be told; its queue would
    lose it without a word.
    """
    batch = item[0]
    for value in vars(batch).values():
        if isinstance(value, Tensor):
            value.share_memory_()


class _From(Sampler):
    """Numbers from one on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _begin(_: int) -> None:
    """What a loader process does first."""
    end_with_parent()
    sys.excepthook = _tell


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error, but not that the trainer was gone when a batch should be handed over.

    It ends, and says itself why.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _ending(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
