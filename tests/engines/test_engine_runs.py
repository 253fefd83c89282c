"""Whole runs under every engine, as a person starts them: train, checkpoint, kill, resume."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.test_train import LAUNCH, ROOT, STUCK, losses
from vlp import checkpoint
from vlp.export.folder import export_run

OPTIONS = (
    "train.duration=30",
    "checkpoint.every=100%",
    "model.image_tower.patch_dropout=0",
    "data.workers=0",
)


def launch(tmp_path, name, *overrides):
    command = [sys.executable, *LAUNCH, str(tmp_path / f"{name}.yaml"), *OPTIONS, *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(process, metrics, n):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (
        metrics.exists() and metrics.read_text().count("\n") >= n
    ):
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_two_ranks_that_wait_for_data_save_within_the_launchers_grace(settings, tmp_path, signum):
    """The launcher signals each rank's process group, loader processes and all."""
    settings(out="run")
    command = [sys.executable, *LAUNCH, str(tmp_path / "run.yaml"), *STUCK, "data.workers=2"]
    # Where the pipeline that gets stuck is found.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(process, tmp_path / "run" / "metrics.jsonl", 4)
    time.sleep(2)
    start = time.monotonic()
    process.send_signal(signum)
    output, _ = process.communicate(timeout=120)
    assert time.monotonic() - start < 30, "the launcher had to kill"
    assert process.returncode != 0  # not a finished run
    assert f"stopped by {signum.name} after step 4; saved" in output
    assert [path.name for path in checkpoint.all_of(tmp_path / "run")] == ["step_00000004"]


@pytest.fixture(scope="module")
def ddp_export(tmp_path_factory):
    return {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_train_kill_resume_export(engine, settings, tmp_path, ddp_export):
    settings(out="run")
    process = launch(tmp_path, "run", f"train.engine={engine}")
    wait_for_steps(process, tmp_path / "run" / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped_at = max(losses(tmp_path / "run"))
    assert 3 <= stopped_at < 30

    process = launch(tmp_path, "run", f"train.engine={engine}", "resume=auto")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert f"step_{stopped_at:08d}" in output  # it continued from the save at the signal
    assert sorted(losses(tmp_path / "run")) == list(range(1, 31))

    export_run(tmp_path / "run", tmp_path / "export")
    weights = load_file(tmp_path / "export" / "open_clip_model.safetensors")
    reference = ddp_export.setdefault("weights", weights)
    whole = torch.cat([w.flatten() for w in reference.values()]).norm()
    distance = torch.cat([(weights[k] - reference[k]).flatten() for k in reference]).norm()
    assert distance <= 1e-4 * whole  # thirty AdamW steps apart from float32's order of additions
