"""How much the host has to launch for a loss by the Triton kernels: counted, with none launched."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pairwise.device import imitated
from vlp.losses import build
from vlp.pairwise.reduction import ROW_MARGIN, Block
from vlp.pairwise.tiled import Kept


class Ops(TorchDispatchMode):
    """Counts what torch launches: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.n_launched = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.n_launched += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch):
    """Kernels of Triton that would have been launched, by name."""
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux alone")
    from triton.runtime import jit

    from vlp.pairwise import triton

    counts: Counter[str] = Counter()

    def launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        assert not warmup and min(grid) > 0
        counts[kernel.__name__] += 1

    monkeypatch.setattr(jit.JITFunction, "run", launch)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(triton, "_widens", lambda matrix: matrix.dtype == torch.bfloat16)
    # As many chunks of 512 rows as of 32,768.
    monkeypatch.setattr(triton, "CHUNK_ROWS", 128)
    monkeypatch.setattr(triton, "CHUNK_BYTES", 128 * 128 * 2)
    return counts


# What is launched besides chunks, which take a kernel and two products: five ops more than today.
@pytest.mark.parametrize(
    "name, dz_kernel, n_other_launches, n_ops",
    [
        ("infonce", "logsumexp_weights_kernel", 6, 62),
        ("siglip", "softplus_weights_kernel", 3, 52),
    ],
)
@pytest.mark.parametrize("n_rows, n_chunks", [(128, 1), (512, 16)])
def test_a_loss_is_launched_in_few_pieces(
    launched, name, dz_kernel, n_other_launches, n_ops, n_rows, n_chunks
):
    rows = torch.nn.functional.normalize(torch.randn(n_rows, 16), dim=1).bfloat16()
    image, text = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (14.0, -10.0))
    objective = build({name: {}}, impl="triton")

    # The first call checks norms.
    with imitated():
        objective(image=image, text=text, scale=scale, bias=bias)
        launched.clear()
        with Ops() as ops:
            objective(image=image, text=text, scale=scale, bias=bias)[0].backward()

    assert launched[dz_kernel] == n_chunks
    assert launched.total() - n_chunks == n_other_launches
    # The sigmoid loss takes memory for the sums of each chunk.
    per_chunk = 3 if name == "siglip" else 2
    assert ops.n_launched - per_chunk * n_chunks <= n_ops
    assert image.grad is not None and scale.grad is not None


def test_rows_without_a_column_get_no_gradient(launched):
    from vlp.pairwise import triton

    block = Block((torch.randn(3, 16),), (torch.randn(0, 16),), shared=(torch.tensor(14.0),))
    statistics = triton.reduce(ROW_MARGIN, block, Kept(0))
    upstream = [torch.ones(3, dtype=torch.float64) for _ in statistics]
    gradients = triton.gradients(ROW_MARGIN, block, statistics, upstream, Kept(0), (True,) * 3)

    assert [statistic.tolist() for statistic in statistics] == [[-torch.inf] * 3, [0.0] * 3]
    assert [gradient.abs().sum() for gradient in gradients] == [0, 0, 0]
    assert launched.total() == 0
