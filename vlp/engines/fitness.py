"""Which optimisers run under which engine."""

from __future__ import annotations

from vlp import config, optim
from vlp.config.optimizer import ADAMW

WHOLE_ON_SHARDS = {"muon", "nmuon"}
WHOLE_ON_SHARDS |= {"lamb", "lambc", "lambw", "lambcw", "lambcd"}
WHOLE_ON_SHARDS |= {"lars", "larc", "nlars", "nlarc"}


def check_optimizer(options: config.Optimizer, engine: str) -> None:
    """ValueError for an optimiser that would compute something else under an engine that cuts its
    tensors, and for options that it does not run with.
    """
    if options.name == ADAMW and not options.options:
        return
    optim.check(options)
    kind = optim.trial(options)

    if engine == "ddp" or (engine == "fsdp2" and _whole_on_shards(options)):
        return
    if not kind.elementwise:
        raise ValueError(
            f"train.optimizer: {options.name} looks at whole tensors, and {engine} cuts them into "
            f"parts; take train.engine={_engines(options)}, or an optimiser of single numbers "
            "(adamw, lion)"
        )
    if kind.counters and engine != "fsdp2":
        raise ValueError(
            f"train.optimizer: {options.name} counts its steps in its groups, which {engine} steps "
            "one by one; take train.engine=ddp or fsdp2, or another optimiser (adamw, lion)"
        )


def _whole_on_shards(options: config.Optimizer) -> bool:
    """Whether the optimiser sees whole tensors through FSDP2's sharded ones.

    Measured on two ranks (tests/engines/test_optimisers.py): norms and products of DTensors are
    those of the whole. What writes a norm in place, or reads shapes of the shards, fails.
    """
    if options.options.get("algo", "muon") != "muon" or options.options.get("caution"):
        return False
    return options.name in WHOLE_ON_SHARDS


def _engines(options: config.Optimizer) -> str:
    return "ddp or fsdp2" if _whole_on_shards(options) else "ddp"
