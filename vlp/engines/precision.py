"""Which arithmetic of the towers is faster here, found by timing a small layer in both."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
from torch import nn

from vlp import config

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
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

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
