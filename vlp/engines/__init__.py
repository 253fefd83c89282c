"""The engines that keep ranks in step: one process, DDP, FSDP2, DeepSpeed's ZeRO. Start reading at
`base`.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch

from vlp import config, dist
from vlp.engines.base import Engine, State
from vlp.engines.fitness import check_optimizer
from vlp.engines.precision import check as check_precision
from vlp.engines.precision import compute_dtype
from vlp.engines.processes import launched_engine, launched_processes
from vlp.engines.replicated import Replicated
from vlp.engines.sharded import Sharded
from vlp.engines.zero import ZeRO
from vlp.joining import LaunchError, join, local_device

__all__ = [
    "Engine",
    "LaunchError",
    "State",
    "compute_dtype",
    "launched_processes",
    "shards_model",
    "start",
]


def start(options: config.Train) -> Engine:
    """Join the process group, choose the device and return the engine asked for.

    LaunchError where what was obtained is not what was asked for: launchers fall back to one
    process, and libraries to plain DDP, without a word.
    """
    n_launched = launched_processes()
    device = torch.device(local_device(options.device))
    check_precision(options, device)

    # The launcher may have decided already; a different wish cannot be met.
    launcher = launched_engine()
    name = launcher if options.engine == "auto" else options.engine
    if launcher not in ("ddp", name):  # its libraries would wrap the model in their own way
        raise LaunchError(
            f"train.engine is {name}, but accelerate launch was configured for {launcher}; "
            "leave train.engine out, or launch "
            f"with launch/accelerate/{name}.yaml (on a CPU cpu2.yaml, which takes any engine)"
        )

    check_optimizer(options.optimizer, name)
    if name.startswith("zero") and device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported

    join(device, timedelta(minutes=options.timeout_minutes))

    # Some launchers fall back to one process without a word.
    if dist.world_size() != n_launched:
        raise LaunchError(
            f"the launcher announced {n_launched} processes, but {dist.world_size()} joined"
        )

    if name == "ddp":
        return Replicated(device)
    if n_launched == 1:
        raise LaunchError(
            f"train.engine is {name}, but there is one process; "
            "start with accelerate launch, or set engine: ddp"
        )
    if name == "fsdp2":
        return Sharded(device)
    return ZeRO(device, stage=int(name[-1]))


def shards_model(engine: Engine) -> bool:
    """Whether each rank holds only a part of the model's weights."""
    return isinstance(engine, Sharded) or (isinstance(engine, ZeRO) and engine.stage == 3)
