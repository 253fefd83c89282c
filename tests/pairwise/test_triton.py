"""The Triton kernels: by the interpreter on a CPU, compiled for Hopper without a GPU, and on a GPU
where there is one.

The interpreter is chosen when Triton is imported, so the cases run in a process of their own. It is
right for float32 and float16; bfloat16 dots under it are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.pairwise import blocks, exact
from tests.pairwise.blocks import Shape
from tests.pairwise.exact import Case, assert_equal, combine, truth
from vlp.losses import build

# Through the objectives: autograd, and the positive's gradient.
CASES = [
    Case(loss, "triton", 1, "global", 1, scale, aligned, rows, dtype, tile_size=16)
    for loss, (scale, aligned, rows, dtype) in product(
        ("infonce", "siglip"),
        (
            (1.0, False, 37, "float32"),
            (100.0, True, 37, "float32"),
            (14.0, False, 1, "float32"),
            (14.0, True, 32, "float16"),
        ),
    )
]

SHAPES = [
    # Odd sizes, own pairs anywhere or nowhere, more columns than a program streams.
    Shape("margin", 37, 50, 20, 100.0, rows="aligned"),
    Shape("margin", 33, 48, 1000, 14.0, 5, tile_size=64),
    Shape("margin", 48, 33, 64, 14.0, -7),
    Shape("margin", 20, 20, 16, 100.0, None),
    Shape("margin", 16, 290, 16, 14.0, 120),
    Shape("margin", 90, 100, 512, 100.0, rows="aligned", tile_size=64),
    Shape("margin", 40, 70, 1280, 100.0, tile_size=64),
    Shape("margin", 1, 1, 16, 14.0),
    # Scales without sense, and sums that underflow: columns and rows get shifts of their own.
    Shape("margin", 20, 20, 16, -14.0),
    Shape("margin", 20, 20, 16, 0.0),
    Shape("margin", 33, 40, 16, 400.0),
    Shape("margin", 33, 40, 16, 100.0, rows="opposite"),
    # One direction, with columns left out.
    Shape("rows", 37, 50, 20, 100.0, None),
    Shape("rows", 37, 50, 768, 14.0, mask="third", tile_size=64),
    Shape("rows", 33, 40, 16, 100.0, rows="opposite", mask="third"),
    Shape("rows", 20, 20, 16, 14.0, mask="all"),
    Shape("margin", 20, 30, 16, 14.0, mask="values"),
    # Several multiples of the scale.
    Shape("multiples", 37, 50, 20, 100.0, rows="aligned"),
    Shape("multiples", 48, 33, 16, 400.0, -7),
    Shape("multiples with 0", 20, 20, 16, 14.0),
    Shape("softplus", 37, 50, 20, 100.0),
    Shape("softplus", 33, 48, 1000, 14.0, 5, tile_size=64),
    Shape("softplus", 16, 290, 16, -14.0, None),
    # D is no multiple of the 8 numbers that a descriptor asks for.
    Shape("margin", 20, 30, 17, 14.0, dtype="float16"),
    Shape("softplus", 20, 30, 17, 14.0, dtype="float16"),
]
# As on cards before Hopper, which take pointers; and in slices, as large blocks are.
POINTERS = [
    Shape("margin", 37, 50, 24, 100.0, 5, rows="aligned"),
    Shape("rows", 37, 50, 24, 14.0, mask="third"),
    Shape("softplus", 37, 50, 24, 14.0, 5),
]
SLICED = [
    Shape("margin", 40, 60, 16, 100.0, 5, rows="aligned"),
    Shape("multiples", 40, 50, 16, 14.0, -7),
    Shape("softplus", 40, 50, 16, 14.0, dtype="float16"),
    Shape("margin", 40, 60, 16, 14.0, 5, dtype="float16"),
]


def interpreted() -> None:
    """In the process with the interpreter: print what the tests below compare."""
    from vlp.pairwise import launches, triton

    embeddings = [exact.embeddings_of_rank(case) for case in CASES]
    errors = [_excess(triton, shape) for shape in SHAPES]
    with mock.patch.object(launches, "takes_descriptors", lambda capability: False):
        by_pointers = [_excess(triton, shape) for shape in POINTERS]

    # Half precision products are added in place by the very call that a GPU gets.
    _define_widening_product()
    sizes = mock.patch.multiple(
        triton, FORWARD=(32, 48), CHUNK_ROWS=24, CHUNK_BYTES=24 * 32 * 2, CHUNK_STEP=16
    )
    with sizes, mock.patch.object(triton, "_widens", lambda a: a.dtype != torch.float32):
        sliced = [_excess(triton, shape) for shape in SLICED]
    print(json.dumps([embeddings, errors, by_pointers, sliced, _not_a_number(triton)]))


def _excess(triton, shape: Shape) -> float:
    return blocks.excess(shape, blocks.computed(triton, shape), blocks.truth(shape))


def _define_widening_product() -> None:
    """`addmm.dtype_out` for CPU tensors: exact products, one float32 sum, into `out` itself."""

    def add(total, a, b, dtype, *, beta=1, alpha=1, out):
        assert (total.data_ptr(), dtype) == (out.data_ptr(), torch.float32)
        return out.addmm_(a.float(), b.float(), beta=beta)

    _define_widening_product.library = torch.library.Library("aten", "IMPL", "CPU")
    _define_widening_product.library.impl("addmm.dtype_out", add)


def _not_a_number(triton) -> bool:
    """Whether a NaN in one row is a NaN in its statistic and in those of all columns."""
    block = blocks.block_of(Shape("margin", 20, 30, 16, 14.0))
    block.left[0][3, 5] = torch.nan
    row, _, columns = triton.reduce(blocks.REDUCTIONS["margin"], block, blocks.Kept(0), 16)
    return bool(row[3].isnan() and columns.isnan().all())


@pytest.fixture(scope="module")
def results():
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux alone")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.pairwise.test_triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_objectives_under_the_interpreter(results):
    embeddings = results[0]
    for case, values in zip(CASES, embeddings):
        assert_equal(case, combine([values]), truth(case))
    assert len(embeddings) == len(CASES) == 8


def test_reductions_under_the_interpreter(results):
    for shapes, errors in zip((SHAPES, POINTERS, SLICED), results[1:4], strict=True):
        for shape, error in zip(shapes, errors, strict=True):
            assert error <= 1, f"{error:.2f} times the error allowed in {asdict(shape)}"
    assert [len(errors) for errors in results[1:4]] == [25, 3, 4]


def test_a_row_that_is_no_number_reaches_every_column(results):
    assert results[4] is True


COMPILE = """
import json, warnings
warnings.simplefilter("ignore")
from tests.benchmarks.kernels import VARIANTS, compile_ahead, measure
rows = [measure(variant, 512, "bf16") for variant in VARIANTS]
float32 = compile_ahead(VARIANTS[0], 24, "fp32")
print(json.dumps([rows, "wgmma" in float32.asm["ptx"], float32.metadata.shared]))
"""


def test_kernels_compile_for_hopper():
    if sys.platform != "linux":
        pytest.skip("Triton is made for Linux alone")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    rows, float32_on_tensor_cores, shared = json.loads(done.stdout)

    # One step of the main loop is 4 products of depth 16 and what feeds them.
    assert not float32_on_tensor_cores and shared <= 227 * 1024
    for row in rows:
        assert row["spilled B"] == 0, row
    shared_by_two = [row for row in rows if row["blocks an SM"] == 2]
    for row in shared_by_two:
        assert row["registers"] <= 128, row
        assert row["main loop"] <= 8 * 100 and row["others"] <= 1000, row
    assert [row["kernel"] for row in shared_by_two] == [
        "margin forward",
        "margin backward",
        "masked rows forward",
        "masked rows backward",
        "softplus forward",
        "softplus backward",
    ]
    assert len(rows) == 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_error_names_what_works():
    with pytest.raises(
        ValueError, match="needs a CUDA device and found none; choose auto, tiled or dense"
    ):
        build({"infonce": {}}, impl="triton")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_a_gpu
def test_objectives_on_a_gpu():
    cases = [
        Case(loss, "triton", 1, "global", 1, scale, aligned, rows, dtype, tile_size=0)
        for loss, dtype, scale, aligned, rows in product(
            ("infonce", "siglip"),
            ("bfloat16", "float16", "float32"),
            (1.0, 14.0, 100.0),
            (False, True),
            (1, 300, 9000),
        )
    ]
    for case in cases:
        assert_equal(case, combine([exact.embeddings_of_rank(case, "cuda")]), truth(case))
    assert len(cases) == 108


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reductions_on_a_gpu(dtype):
    from vlp.pairwise import triton

    shapes = [replace(shape, dtype=dtype, tile_size=0) for shape in SHAPES + SLICED]
    # Several tiles, chunks and launches, with ends that fit none; a D that descriptors refuse.
    large = [
        Shape("margin", 5000, 9001, 512, 100.0, 1000, rows="aligned"),
        Shape("rows", 3001, 5000, 1001, 14.0, mask="third"),
        Shape("multiples", 5000, 4100, 768, 100.0, -300),
        Shape("softplus", 5000, 9001, 1280, 100.0, 1000),
        Shape("margin", 300, 500, 512, 100.0, rows="opposite"),
    ]
    shapes += [replace(shape, dtype=dtype, tile_size=0) for shape in large]
    for shape in shapes:
        expected = blocks.truth(shape, "cuda")
        error = blocks.excess(shape, blocks.computed(triton, shape, "cuda"), expected)
        assert error <= 1, f"{error:.2f} times the error allowed in {asdict(shape)}"
    assert len(shapes) == 34


@pytest.mark.gpu
@on_a_gpu
def test_half_precision_products_add_in_place_on_a_gpu():
    from vlp.pairwise import triton

    total = torch.randn(512, 256, device="cuda")
    a, b = (torch.randn(300, n, device="cuda").bfloat16() for n in (256, 256))
    expected = total[100:356].double() + a.T.double() @ b.double()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    triton._accumulate(total[100:356], a.T, b)
    assert torch.cuda.max_memory_allocated() - before < total[100:356].nbytes
    assert (total[100:356] - expected).norm() <= 1e-6 * expected.norm()

    # What comes first is written over whatever lies there.
    total.fill_(torch.nan)
    triton._accumulate(total[100:356], a.T, b, is_first=True)
    product = a.T.double() @ b.double()
    assert (total[100:356] - product).norm() <= 1e-6 * product.norm()


@pytest.mark.gpu
@on_a_gpu
def test_memory_of_a_large_batch_on_a_gpu():
    objective = build({"infonce": {}}, impl="triton")
    generator = torch.Generator("cuda").manual_seed(0)
    drawn = (torch.randn(32768, 512, device="cuda", generator=generator) for _ in range(2))
    x, t = (F.normalize(rows, dim=1).bfloat16().requires_grad_() for rows in drawn)
    scale = torch.tensor(14.0, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    objective(image=x, text=t, scale=scale)[0].backward()
    # 300 MiB, and the gradients of the embeddings.
    assert torch.cuda.max_memory_allocated() - before <= (300 + 64) * 2**20


if __name__ == "__main__":
    interpreted()
