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
from itertools import product

import pytest
import torch

from tests.pairwise import exact
from tests.pairwise.exact import Case, assert_equal, combine, truth
from vlp.losses import build

CASES = [
    Case(loss, "triton", 1, "global", 1, scale, aligned, rows, dtype, tile_size=16)
    for loss, dtype, (scale, aligned, rows) in product(
        ("infonce", "siglip"),
        ("float32", "float16"),
        (
            (1.0, False, 37),
            (14.0, True, 32),
            (100.0, True, 37),
            (100.0, False, 50),
            (14.0, False, 1),
        ),
    )
]


def interpreted() -> None:
    print(json.dumps([exact.embeddings_of_rank(case) for case in CASES]))


def test_kernels_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.pairwise.test_triton"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)

    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for case, found in zip(CASES, results):
        assert_equal(case, combine([found]), truth(case))
    assert len(results) == len(CASES) == 20


COMPILE = """
import json, warnings
warnings.simplefilter("ignore")
from vlp.pairwise import triton
print(json.dumps([
    [mode, dtype, name, kernel.metadata.shared, "wgmma" in kernel.asm["ptx"]]
    for mode, dtype, D in (
        ("margin", "bf16", 512), ("margin", "fp32", 24), ("softplus", "bf16", 512)
    )
    for name, kernel in triton.compile_ahead(D, dtype, mode).items()
]))
"""


def test_kernels_compile_for_hopper():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    for _, dtype, _, shared, tensor_cores in kernels:
        assert shared <= 227 * 1024  # a Hopper block's shared memory
        assert tensor_cores == (dtype == "bf16")
    assert [name for *_, name, _, _ in kernels] == ["statistics_kernel", "weights_kernel"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_error_names_what_works():
    with pytest.raises(
        ValueError, match="needs a CUDA device and found none; choose auto, tiled or dense"
    ):
        build({"infonce": {}}, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu():
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


if __name__ == "__main__":
    interpreted()
