"""The arithmetic of the towers: which is faster here, found by timing a small layer in both, and
what a GPU is told about it.
"""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
from torch import nn

from vlp import config, log
from vlp.joining import LaunchError

# .4 GFLOP forward and backward: milliseconds, yet more than the calls themselves cost.
ROWS, WIDTH = 128, 256
TRIALS = 4
GAIN = 0.9  # bf16 rounds, so it has to take at most this share of float32's time

Precision = Literal["float32", "bf16"]
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


@functools.cache
def faster(device_type: str) -> Precision:
    """bf16 where it is clearly faster than float32 on this machine: on GPUs that have it, on CPUs
    by a measurement.

    AMX and AVX512-BF16 multiply bf16 faster; other CPUs emulate it, several times slower. The
    global random state is not touched. Ranks may find different answers: one has to decide for all.
    """
    if device_type == "cuda":
        return "bf16" if _gpu_has_bf16() else "float32"

    # On one thread its own clock sees all the work, however busy the machine is.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _measured()
    finally:
        torch.set_num_threads(n_threads)
    return "bf16" if seconds["bf16"] <= GAIN * seconds["float32"] else "float32"


def _measured() -> dict[Precision, float]:
    """Seconds of the processor for a forward and backward pass on one core."""
    layer, rows = _layer(), torch.ones(ROWS, WIDTH)

    # In turn, so that a slower moment of the machine meets both.
    seconds: dict[Precision, list[float]] = {"float32": [], "bf16": []}
    for _ in range(TRIALS + 1):
        for name, taken in seconds.items():
            start = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                out = layer(rows)
            out.float().sum().backward()
            taken.append(time.thread_time() - start)

    # The first trial compiles kernels.
    return {name: min(taken[1:]) for name, taken in seconds.items()}


def _layer() -> nn.Module:
    """A transformer's feed-forward layer with constant weights."""
    layer = nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH, device="meta"),
        nn.GELU(),
        nn.Linear(4 * WIDTH, WIDTH, device="meta"),
    )
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 0.01)
    return layer


def compute_dtype(options: config.Train, device: torch.device) -> torch.dtype:
    """The dtype of the towers' arithmetic; parameters, scale, bias and the loss stay float32."""
    if options.precision == "auto":
        return DTYPES[faster(device.type)]
    return DTYPES[options.precision]


def check(options: config.Train, device: torch.device) -> None:
    """LaunchError where the run's precision is bf16 and the GPU has none.

    torch would emulate it there, several times slower than float32.
    """
    if options.precision != "bf16" or device.type != "cuda" or _gpu_has_bf16():
        return
    name = torch.cuda.get_device_name(device)
    raise LaunchError(
        f"train.precision is bf16, which {name} does not have; set train.precision: float32, or "
        "auto, or use a GPU of compute capability 8.0 (Ampere) or later"
    )


def set_up(options: config.Train, device: torch.device) -> None:
    """Tell torch how to compute on a GPU. Raises what `check` raises."""
    check(options, device)
    if device.type != "cuda":
        return

    # All batches have one shape, so cuDNN's search for the fastest convolution pays.
    torch.backends.cudnn.benchmark = True

    # By itself torch lets convolutions, but no matrix products, round float32 to TF32's 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    if compute_dtype(options, device) == torch.float32 and _gpu_has_bf16():
        log.say(
            "train.precision is float32, without TF32: exact, and several times slower on this "
            "GPU than train.precision=bf16"
        )


def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
