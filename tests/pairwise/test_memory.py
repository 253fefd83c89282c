"""Memory of the loss: what is never allocated, and how it grows. Each peak is measured in a process
of its own.
"""

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20

MEASURE = """
import torch
from tests.benchmarks.loss import loss_of, peak_memory
torch.manual_seed(0)
device = torch.device("cpu")
loss = loss_of("{method}", device)
def rows(n):
    return torch.nn.functional.normalize(torch.randn(n, {D}), dim=1).requires_grad_()

def run(n):
    x, t = rows(n), rows(n)
    scale = torch.tensor(14.0, requires_grad=True)
    return lambda: loss(x, t, scale).backward()
run(256)()
print(peak_memory(run({B}), device))
"""


def extra_memory(method: str, B: int, D: int) -> float:
    command = [sys.executable, "-c", MEASURE.format(method=method, B=B, D=D)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )

    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", ["tiled", "tiled siglip"])
def test_the_matrix_is_never_stored(method):
    """B = 6,144: one float32 matrix of scores takes 144 MiB; the engine's tiles and gradients a
    fraction of that.
    """
    assert extra_memory(method, 6144, 64) < 50 * MIB


def test_the_measurement_sees_a_matrix():
    """The control: the dense reference stores it, and more than once."""
    assert extra_memory("dense", 6144, 64) > 288 * MIB


@pytest.mark.slow
def test_memory_grows_linearly():
    """B = 65,536: under 2 GiB, where the matrix alone would take 16."""
    small, large = extra_memory("tiled", 16384, 32), extra_memory("tiled", 65536, 32)
    assert large < 4.5 * small and large < 2048 * MIB
