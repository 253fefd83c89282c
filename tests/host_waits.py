"""Where the host would wait for a device, counted on the CPU: questions whose answers it needs to
go on, and copies that block it.

    with HostWaits() as waits:
        train_step(training, batch)
    assert not waits.places

Counted are `.item()`, `bool(tensor)` and the like, results whose shape depends on values (nonzero,
unique, masked_select, indexing by a mask), `.tolist()`, `.cpu()`, numbers sent to a device one by
one (torch.tensor and as_tensor with `device=`), and exchanges of pickled objects. What a CUDA build
alone does is not: `torch.cuda.set_sync_debug_mode` sees that.
"""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
aten = torch.ops.aten

ANSWERS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.masked_select.default,
}
# Of these only the forms whose index is a mask.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
METHODS = ("tolist", "cpu")
OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")


class HostWaits(TorchDispatchMode):
    """`places` counts, by "file:line what", the waits of this project's code while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._patches = ExitStack()

    def __enter__(self) -> HostWaits:
        for name in METHODS:
            self._patch(torch.Tensor, name, lambda *_, **__: True)
        for name in ("tensor", "as_tensor"):
            self._patch(torch, name, _sends_a_number)
        for name in OBJECTS:
            self._patch(torch_dist, name, lambda *_, **__: True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ANSWERS or (func in INDEXED and _by_mask(args[1])):
            self._count(str(func))
        return func(*args, **(kwargs or {}))

    def _patch(self, owner: Any, name: str, waits: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def counted(*args: Any, **keywords: Any) -> Any:
            if waits(*args, **keywords):
                self._count(name)
            return original(*args, **keywords)

        self._patches.enter_context(mock.patch.object(owner, name, counted))

    def _count(self, what: str) -> None:
        # The innermost line of ours, whoever asks below it.
        ours = [frame for frame in traceback.extract_stack() if _in_package(frame.filename)]
        if not ours:
            return
        path = Path(ours[-1].filename).relative_to(ROOT).as_posix()
        self.places[f"{path}:{ours[-1].lineno} {what}"] += 1


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _sends_a_number(data: Any, *_: Any, device: Any = None, **__: Any) -> bool:
    return device is not None and not isinstance(data, Tensor)


def _in_package(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("vlp", "eval")
