"""An optimiser by name: vlp's fused AdamW, or any of timm's that runs in a step of vlp."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn

from vlp.config import Optimizer
from vlp.config.optimizer import ADAMW
from vlp.optim.groups import groups
from vlp.optim.schedules import own_schedule
from vlp.schema import did_you_mean

LOOKAHEAD = "lookahead_"
# What the configuration has keys of its own for, and what the step decides.
_OF_THE_CONFIGURATION = ("lr", "weight_decay")
_OF_THE_STEP = (
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "maximize",
    "verbose",
    "adamw_lr",
)


def build(model: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """The optimiser over `groups`. ValueError as `check` and `groups`."""
    check(options)
    of_matrices = options.name != ADAMW and _is_muon(options.name)
    return create(groups(model, options, of_matrices), options)


def create(parameter_groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.Optimizer:
    """The optimiser over groups that exist already."""
    arguments = _arguments(options)
    if options.name == ADAMW:
        return torch.optim.AdamW(parameter_groups, lr=options.lr, fused=True, **arguments)

    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(parameter_groups, opt=options.name, lr=options.lr, **arguments)


def check(options: Optimizer) -> None:
    """ValueError for a name that does not exist or cannot run, options that the optimiser does not
    take, and a schedule that does not exist.
    """
    own_schedule(options.schedule)
    if options.name != ADAMW:
        _check_name(options.name)

    taken = accepted(options.name)
    for name in options.options:
        if name in _OF_THE_CONFIGURATION:
            raise ValueError(
                f"train.optimizer.options.{name}: write train.optimizer.{name} instead"
            )
        if name not in taken:
            raise ValueError(
                f"train.optimizer.options: {options.name} takes no {name!r}; "
                f"it takes {', '.join(sorted(taken))}"
            )

    for name in ("betas", "eps"):
        if getattr(options, name) is None:
            continue
        if name not in taken:
            raise ValueError(
                f"train.optimizer.{name}: {options.name} takes none; set it to null "
                f"({options.name} takes {', '.join(sorted(taken))})"
            )
        if name in options.options and options.name != ADAMW:
            raise ValueError(f"train.optimizer.{name} is also in train.optimizer.options; drop one")


def _check_name(name: str) -> None:
    from timm.optim import get_optimizer_info, list_optimizers

    known = [str(known_name) for known_name in list_optimizers()]
    base = name.removeprefix(LOOKAHEAD)
    if base not in known:
        choices = [known_name for known_name in known if obstacle(known_name) is None]
        raise ValueError(
            f"train.optimizer.name: no optimiser {name!r}{did_you_mean(base, choices)}"
        )

    reason = obstacle(base)
    if reason is not None:
        description = get_optimizer_info(base).description
        raise ValueError(
            f"train.optimizer.name: {name} ({description}) does not run here: {reason}; "
            "take adamw, lion or muon"
        )


def obstacle(name: str) -> str | None:
    """Why an optimiser of timm's list cannot run in a step of vlp; None where it can."""
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(name.removeprefix(LOOKAHEAD))
    if info.second_order:
        return "it needs second derivatives, which would take a second backward pass"
    if isinstance(info.opt_class, str):
        package = info.opt_class.partition(".")[0]
        return f"its code is the package {package}'s, whose state no checkpoint of vlp holds"
    if info.opt_class.__name__ == "Kron":
        return "it draws random numbers of its own, which no checkpoint of vlp holds"
    return None


def accepted(name: str) -> set[str]:
    """The options that an optimiser takes, betas and eps among them."""
    parameters = inspect.signature(_class(name).__init__).parameters
    left_out = {"self", "params", *_OF_THE_CONFIGURATION, *_OF_THE_STEP}
    return set(parameters) - left_out


def _class(name: str) -> type[torch.optim.Optimizer]:
    if name == ADAMW:
        return torch.optim.AdamW
    from timm.optim import get_optimizer_class

    # A class and no partial of one, because its defaults are not bound.
    optimizer_class = get_optimizer_class(name.removeprefix(LOOKAHEAD), bind_defaults=False)
    return cast(type[torch.optim.Optimizer], optimizer_class)


def _is_muon(name: str) -> bool:
    from timm.optim import Muon

    return issubclass(_class(name), Muon)


def _arguments(options: Optimizer) -> dict[str, Any]:
    """Keywords of the optimiser's class, besides groups and rate."""
    taken = accepted(options.name)
    arguments = {name: _value(name, value) for name, value in options.options.items()}
    for name in ("betas", "eps"):
        if getattr(options, name) is not None:
            arguments.setdefault(name, getattr(options, name))
    if options.name == ADAMW:
        return arguments

    # timm would give all of them .9; Muon's own is .95, and SGD's 0.
    parameters = inspect.signature(_class(options.name).__init__).parameters
    if "momentum" in taken and parameters["momentum"].default:
        arguments.setdefault("momentum", parameters["momentum"].default)

    # Only fused does Adam look at the verdict on the device.
    if issubclass(_class(options.name), torch.optim.Adam) and not options.name.startswith(
        LOOKAHEAD
    ):
        arguments["fused"] = True
    return arguments


def _value(name: str, value: Any) -> Any:
    """An option as the class wants it: a dtype by its name."""
    if not name.endswith("dtype") or not isinstance(value, str):
        return value
    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"train.optimizer.options.{name} is {value!r}; expected a dtype, such as float32"
        )
    return dtype


def guards_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimiser leaves a step out by itself where `found_inf` says so, on the device:
    fused Adam and AdamW.

    Fused SGD does not at its first step, and the others know no such thing.
    """
    is_adam = isinstance(optimizer, torch.optim.Adam)
    return is_adam and bool(optimizer.param_groups[0].get("fused"))


def set_up_step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its rate for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
