"""What a device does differently, imitated on the CPU: bfloat16 products with float32 results, and
a host that must not ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlp.pairwise import reduction

# A number read by the host, rows chosen by a mask, and a number that the host sends.
QUESTIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "lift_fresh"}
PRODUCTS = {"mm", "addmm", "addmm_"}


@contextmanager
def imitated() -> Iterator[None]:
    """CPU tensors count as a device's, whose products of bfloat16 the CPU lacks."""
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("mm.dtype_out", _mm, "CPU")
    kernels.impl("addmm.dtype_out", _addmm, "CPU")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reduction, "on_device", lambda tensor: True)
            yield
    finally:
        kernels._destroy()


def _mm(left: Tensor, right: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    assert left.dtype == right.dtype == torch.bfloat16
    assert out_dtype == out.dtype == torch.float32
    return out.copy_(left.float() @ right.float())


def _addmm(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    assert left.dtype == right.dtype == torch.bfloat16 and alpha == 1
    assert out_dtype == out.dtype == total.dtype == torch.float32
    product = left.float() @ right.float()
    # Without beta the total is not read, whatever lies there.
    return out.copy_(product if beta == 0 else beta * total + product)


class Watch(TorchDispatchMode):
    """Counts products by the dtype of their operands, and what the host asks."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[torch.dtype] = Counter()
        self.questions: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            self.products[args[-2 if name == "mm" else 1].dtype] += 1
        by_mask = name == "index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in QUESTIONS or by_mask:
            self.questions[str(function)] += 1
        return function(*args, **(kwargs or {}))
