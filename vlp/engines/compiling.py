"""torch.compile of the model's blocks: whether, and how."""

from __future__ import annotations

import functools
from typing import Literal

import torch

from vlp import dist, log
from vlp.models.dual_encoder import DualEncoder

# Two towers and heads, with and without gradient, each for a first and for changing numbers of
# rows: more than torch's 8, after which it would go on without compiling.
MAX_GRAPHS = 64

OPTIONS = {
    # Kernels of its own would draw other numbers than the same dropout does uncompiled, or in
    # another graph: the second pass over a micro-batch has to repeat the first.
    "fallback_random": True,
}


def decide(wish: Literal["auto", True, False], device: torch.device) -> bool:
    """Whether to compile, for all ranks alike. Collective.

    auto: on a GPU where compiling works, which is tried; on a CPU never, because there it gains a
    few per cent after most of a minute.
    """
    if isinstance(wish, bool):
        return wish
    if device.type == "cpu":
        return False

    # Ranks with and without would differ in the last bits, and wait for one another.
    obstacles = [text for text in dist.gather_objects(obstacle(device)) if text]
    if obstacles and dist.is_main():
        log.warn(
            f"train.compile: auto is off, because torch.compile fails here: {obstacles[0]}; "
            "mend that for faster steps, or set train.compile: false to go without this line"
        )
    return not obstacles


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why torch.compile does not work on this machine, in a line; empty where it does.

    A GPU without Triton, a machine without a C compiler or with a full or read-only cache show only
    when something is compiled.
    """
    values = torch.zeros(8, device=device)
    try:
        torch.compile(_sample)(values)
    except Exception as error:  # whatever the compiler chain raises is an answer
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return ""


def _sample(values: torch.Tensor) -> torch.Tensor:
    return values.sin() + 1


def compile_blocks(model: DualEncoder, recomputed: bool = False) -> None:
    """Compile every block of `model` in place, each at its first call. `recomputed`: whether
    backward computes blocks again.

    Blocks, not the model: gradients of a block are ready, and travel under DDP, while the blocks
    before it are still at work; FSDP2 gathers block by block and recomputation starts block by
    block, so that the graphs are the same for all three; and as blocks of one kind share their
    graphs, depth adds nothing to the time of compiling. Compiled as a whole, the model broke into
    20 graphs under FSDP2 where these are 4.
    """
    # Texts that take part change in number with every batch; the model rounds it to a few.
    model.static_shapes = True

    # A graph for the first number of rows and one for all others is fastest. Recomputing might
    # meet the other one of the two, whose tensors torch would not know: then one for all.
    dynamic = True if recomputed else None

    # Of the whole process: torch 2.11 has no such keyword of `compile`.
    from torch._dynamo import config as dynamo  # takes seconds to import

    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)
    for block in model.blocks():
        block.compile(options=OPTIONS, dynamic=dynamic)
