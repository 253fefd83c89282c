"""What a launcher started is what was asked for, or it is refused with the command that works."""

import os
import subprocess
import sys

import pytest

from tests.test_train import ROOT
from vlp.config import Duration, Train
from vlp.engines import LaunchError, launched_processes, start

VARIABLES = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION",
    "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip
WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def make(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1"}, 1),
        ({"WORLD_SIZE": "2", **WHOLE}, 2),
        ({"WORLD_SIZE": "2", **WHOLE, "SLURM_STEP_NUM_TASKS": "4"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, 1),
        ({"MASTER_ADDR": "node1"}, 1),
    ],
)
def test_what_holds_together_is_accepted(environment, variables, count):
    environment(**variables)
    assert launched_processes() == count


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"WORLD_SIZE": "2"}, ("RANK", "MASTER_ADDR", "torchrun", "unset WORLD_SIZE")),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("LOCAL_RANK", "torchrun")),
        ({"WORLD_SIZE": "two"}, ("'two'", "a number")),
        ({"WORLD_SIZE": "0"}, ("'0'", "a number")),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            ("started one", "cpu2.yaml", "torchrun"),
        ),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS is 4", "train.sbatch")),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, ("OMPI_COMM_WORLD_SIZE is 2", "torchrun")),
        ({"PMI_SIZE": "2"}, ("PMI_SIZE is 2", "accelerate launch")),
    ],
)
def test_what_does_not_is_refused_with_a_way_out(environment, variables, parts):
    environment(**variables)
    with pytest.raises(LaunchError) as caught:
        launched_processes()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_accelerate_asked_for_two_on_a_cpu_is_refused_for_starting_one(settings, tmp_path):
    settings(out="run")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "launch/train.py",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "run.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "vlp: accelerate was asked for several processes and started one" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("fsdp2", "ddp"),
        ("fsdp2", "zero2"),
        ("zero2", "fsdp2"),
        ("zero2", "ddp"),
        ("zero2", "zero1"),
    ],
)
def test_an_engine_that_the_launcher_was_not_configured_for_is_refused(
    environment, monkeypatch, launcher, engine
):
    environment()
    if launcher == "fsdp2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv(
            "ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ROOT / f"launch/deepspeed/{launcher}.json")
        )
    with pytest.raises(
        LaunchError,
        match=f"train.engine is {engine}, .* configured for {launcher}; .*{engine}.yaml",
    ):
        start(Train(Duration(2, "steps"), 8, engine=engine))


@pytest.mark.parametrize(
    ("typed", "restarts", "expected"),
    [
        ([], 0, ["resume=auto"]),
        (["resume=RUN/checkpoints/step_2"], 0, ["resume=RUN/checkpoints/step_2"]),
        (["resume=RUN/checkpoints/step_2"], 1, ["resume=RUN/checkpoints/step_2", "resume=auto"]),
    ],
)
def test_a_job_starts_where_it_is_told_and_goes_on_from_where_it_was(
    tmp_path, typed, restarts, expected
):
    """The script itself, with commands of SLURM that only write down what they are asked."""
    asked = tmp_path / "asked"
    for name, does in (("scontrol", "echo node1"), ("srun", f'printf "%s\\n" "$@" > {asked}')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = ROOT / "launch" / "slurm" / "train.sbatch"
    subprocess.run(["bash", script, "clip", *typed], env=environment, check=True, timeout=60)
    arguments = asked.read_text().splitlines()
    assert [argument for argument in arguments if argument.startswith("resume=")] == expected
