"""The processes that the launcher started, and the engine it was configured for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlp.joining import LaunchError

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torch joins processes by
_JOB_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_processes() -> int:
    """How many processes the launcher has started, by its environment; LaunchError where that does
    not hold together.
    """
    announced = os.environ.get("WORLD_SIZE")
    if announced is None:
        _refuse_single(os.environ)
        return 1
    if not announced.isdecimal() or int(announced) < 1:
        raise LaunchError(
            f"WORLD_SIZE is {announced!r}, expected a number of processes; "
            "unset it, or start with torchrun"
        )

    n_processes = int(announced)
    missing = [name for name in _RENDEZVOUS if name not in os.environ]
    if n_processes > 1 and missing:
        raise LaunchError(
            f"WORLD_SIZE announces {n_processes} processes, but {', '.join(missing)} is not set; "
            f"start with torchrun --nproc-per-node {n_processes} launch/train.py … "
            "or accelerate launch, or unset WORLD_SIZE for one process"
        )
    # Such a rank would wait for a number of others that never come.
    rank = os.environ.get("RANK", "0")
    if not rank.isdecimal() or int(rank) >= n_processes:
        raise LaunchError(
            f"RANK is {rank!r}, expected a number below WORLD_SIZE, which is {n_processes}; give "
            "every node the same number of nodes and of processes, or start with torchrun"
        )
    return n_processes


def _refuse_single(environment: Mapping[str, str]) -> None:
    """LaunchError where several processes were asked for, but each would be a run of its own."""
    # The marks of accelerate's launcher of one process, which was asked for more.
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys():
        raise LaunchError(
            "accelerate was asked for several processes and started one, as it does with --cpu; "
            "start two on a CPU with "
            "accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py CONFIG, "
            "or with torchrun --nproc-per-node 2 launch/train.py CONFIG"
        )

    for name in _JOB_SIZES:
        if int(environment.get(name, "1")) > 1:
            raise LaunchError(
                f"{name} is {environment[name]}: srun or mpirun started several processes that "
                "do not know of one another; let one task a node start torchrun or "
                "accelerate launch, as launch/slurm/train.sbatch does"
            )


def launched_engine() -> str:
    """What `accelerate launch` was configured for, from the environment that it sets."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if not file:
            return f"zero{os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}"
        settings = json.loads(Path(file).read_text())
        return f"zero{settings['zero_optimization']['stage']}"

    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"


def accelerator(device: torch.device, deepspeed_plugin: Any = None) -> Any:
    """Accelerate's view of the processes joined in `start`, held to be the one that was meant."""
    from accelerate import Accelerator, PartialState

    # Whichever call creates the state first decides for the whole process.
    on_cpu = device.type == "cpu"
    PartialState(cpu=on_cpu)

    if deepspeed_plugin is None:
        joined = Accelerator(cpu=on_cpu)
    else:
        joined = Accelerator(deepspeed_plugin=deepspeed_plugin)
    if joined.device.type != device.type:
        raise LaunchError(
            f"Accelerate chose {joined.device}, but training runs on {device}; set train.device"
        )
    return joined
