"""Exactness and resume with the kernels of other processors, and with one thread and two.

torch and oneDNN choose kernels by what the processor offers, and a kernel may round a row
differently by its place in a batch, by shapes and by threads. What is promised bit for bit must
hold with any of them; what is compared across shapes must be compared within rounding.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXACT = (
    "tests/test_step.py", "tests/test_train.py", "tests/test_teacher.py", "tests/test_lit.py",
    "tests/models/test_heads.py", "tests/selection", "tests/losses/test_moving.py",
    "tests/losses/test_draws.py", "tests/models/test_model.py", "tests/export/test_export.py",
    "tests/pairwise/test_exactness.py", "tests/pairwise/test_reductions.py",
    "tests/eval/test_models.py", "tests/eval/test_engineering.py", "tests/data/test_loader.py",
)  # fmt: skip
SAMPLE = (
    "tests/models/test_heads.py::test_what_heads_give",
    "tests/selection/test_jest.py::test_a_run_that_stops_goes_on_exactly_and_counts_its_cost",
)
# Where a processor has less than a setting names, its own best kernels are taken.
PROCESSORS = {
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX-512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX-512 with bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    },
}


def run(tests, processor, threads):
    """(passed, output) of these tests in a process of their own, with a processor's kernels."""
    environment = os.environ | PROCESSORS[processor]
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "not slow", *tests]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", result.stdout)
    output = result.stdout[-6000:] + result.stderr[-2000:]
    if result.returncode != 0 or passed is None:
        return 0, output
    return int(passed[1]), output


def test_a_resumed_run_and_equal_rows_without_vector_kernels():
    n_passed, output = run(SAMPLE, "no vectors", threads=1)
    assert n_passed == len(SAMPLE), output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_exactness_and_resume_hold(processor, threads):
    n_passed, output = run(EXACT, processor, threads)
    assert n_passed > 150, output
