"""The benchmark of a card, as far as it can be tried without one."""

import json
import subprocess
import sys
import time

import pytest
import torch

from tests.benchmarks import gpu, report


def tables():
    """What a good run measures."""
    step = {"model": "ViT-B-32", "method": "vlp compile", "host waits": 0, "speed / its best": 1.4}
    loss = {"method": "triton", "D": 512, "ms": 7.0, "extra MiB": 250.0, "share": 0.7}
    return {
        "tests": [{"result": "passed"}, {"result": "skipped"}],
        "loss": [loss | {"B": 32768}, loss | {"B": 2**20}],
        "step": [step, step | {"model": "ViT-B-16", "speed / its best": 1.2}],
    }


def test_targets_hold_or_not():
    assert [row["holds"] for row in gpu.targets(tables())] == [True] * 7

    worse = tables()
    worse["tests"].append({"result": "failure"})
    worse["loss"][0] |= {"ms": 7.3, "extra MiB": 301.0}
    worse["loss"][1] |= {"share": 0.5}
    worse["step"][0] |= {"host waits": 1, "speed / its best": 1.2}
    worse["step"][1] |= {"speed / its best": 1.1}
    assert [row["holds"] for row in gpu.targets(worse)] == [False] * 7


def test_what_was_not_measured_holds_nothing():
    assert [row["measured"] for row in gpu.targets({})] == [None] * 7

    # Skipped tests show nothing, and a measurement that broke off left an empty cell.
    skipped = {"tests": [{"result": "skipped"}]}
    broken = {"model": "ViT-B-32", "method": "vlp", "host waits": None, "speed / its best": None}
    rows = gpu.targets(skipped | {"step": [broken]})
    assert [row["holds"] for row in rows] == [None] * 7


def test_what_no_longer_fits_is_listed():
    results = {"tables": {"loss": []}, "not run": []}
    gpu.carry_out(gpu.loss(["64"], "32", "tiled"), results, time.monotonic() + 5)
    assert not results["tables"]["loss"]
    assert "loss.py --batch 64 --dim 32 --methods tiled: 5 s were left" in results["not run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_card_it_says_so():
    with pytest.raises(SystemExit, match=r"measures a GPU and found none.*--rehearse"):
        gpu.refuse_without_a_card(rehearse=False)


@pytest.mark.slow
def test_rehearsal(tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, "tests/benchmarks/gpu.py", "--rehearse", "--json", str(file)]
    command += ["--parts", "tests", "loss", "step"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    results = json.loads(file.read_text())
    assert not results["not run"]
    assert {part: len(rows) for part, rows in results["tables"].items()}["step"] == 2
    assert all(row["result"] == "skipped" for row in results["tables"]["tests"])
    assert len(results["targets"]) == 7
