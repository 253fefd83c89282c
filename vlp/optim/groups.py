"""Groups of parameters: weight decay only where it belongs, rates by tower, pattern and layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from vlp.config import Group, Optimizer
from vlp.optim.layers import layer_factors

# Tables of vectors that are looked up or added, not multiplied: pulling them towards zero has no
# reason.
EMBEDDING = re.compile(
    r"(^|\.)(token_embedding|positional_embedding|class_embedding|cls_token|pos_embed|reg_token"
    r"|\w*embeddings|embed_tokens|wte|wpe|shared)(\.|$)"
)
TOWERS = {"image": "visual.", "text": "text."}  # how names of a tower's parameters begin


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies to a parameter.

    To matrices and kernels, never to gains, biases, embeddings, scale and bias.
    """
    return parameter.ndim >= 2 and not EMBEDDING.search(name)


def groups(model: nn.Module, options: Optimizer, of_matrices: bool = False) -> list[dict[str, Any]]:
    """The parameter groups of an optimiser: every trainable parameter exactly once.

    A group holds what has one `lr_factor` (train.optimizer.groups times layer_decay) and one
    `weight_decay`. of_matrices: the optimiser (Muon) is for matrices inside blocks alone; all else
    is in groups with `use_fallback`.

    ValueError if nothing is trainable, or a configured group holds nothing.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter; unlock a tower or learn the scale")

    configured = _assigned(options.groups, trainable, model)
    layers = layer_factors(model, options.layer_decay)
    in_blocks = _block_matrices(model) if of_matrices else set()

    by_setting: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        group = configured.get(name)
        lr_factor, weight_decay = layers.get(name, 1.0), options.weight_decay
        if group is not None:
            lr_factor, weight_decay = lr_factor * group.lr, weight_decay * group.weight_decay
        if not decays(name, parameter):
            weight_decay = 0.0

        falls_back = of_matrices and name not in in_blocks
        setting = (lr_factor, weight_decay, falls_back)
        by_setting.setdefault(setting, []).append(parameter)

    result = []
    for (lr_factor, weight_decay, falls_back), parameters in by_setting.items():
        entry = {"params": parameters, "weight_decay": weight_decay, "lr_factor": lr_factor}
        if falls_back:
            entry["use_fallback"] = True
        result.append(entry)
    return result


def _assigned(
    configured: list[Group], trainable: dict[str, nn.Parameter], model: nn.Module
) -> dict[str, Group]:
    """The first configured group that each parameter fits; ValueError for one that holds none."""
    assigned: dict[str, Group] = {}
    for place, group in enumerate(configured):
        fitting = [name for name in trainable if _fits(group, name)]
        left = [name for name in fitting if name not in assigned]
        if not left:
            raise ValueError(
                f"train.optimizer.groups.{place} {_why_empty(group, place, fitting, model)}"
            )
        assigned |= dict.fromkeys(left, group)
    return assigned


def _fits(group: Group, name: str) -> bool:
    if group.tower is not None and not name.startswith(TOWERS[group.tower]):
        return False
    return group.pattern is None or re.search(group.pattern, name) is not None


def _why_empty(group: Group, place: int, fitting: list[str], model: nn.Module) -> str:
    """What is wrong with a group that holds no parameter, and what to write."""
    asked = f"({group.tower or 'any part'}, pattern {group.pattern!r})"
    if fitting:
        return (
            f"{asked} holds nothing: all {len(fitting)} parameters that it fits, such as "
            f"{fitting[0]}, are in groups before it; move it to the front"
        )

    names = [name for name, _ in model.named_parameters()]
    frozen = [name for name in names if _fits(group, name)]
    if frozen:
        return (
            f"{asked} fits {len(frozen)} parameters, such as {frozen[0]}, and none of them learns; "
            "unlock the tower, or leave the group out"
        )
    return f"{asked} fits no parameter; {_near(group, names)}"


def _near(group: Group, names: Iterable[str]) -> str:
    """Names of parameters near to a pattern's text."""
    prefix = TOWERS[group.tower] if group.tower else ""
    candidates = [name for name in names if name.startswith(prefix)]

    # Of parts of names too: few patterns are as long as a name.
    parts = {part for name in candidates for part in name.split(".") if not part.isdigit()}
    text = group.pattern or ""
    close = difflib.get_close_matches(text, [*candidates, *sorted(parts)], n=3, cutoff=0.5)
    shown = close or candidates[:3]
    return f"near to it: {', '.join(shown)}" if close else f"names are like {', '.join(shown)}"


def _block_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices and kernels inside the repeated blocks of towers and heads."""
    inside = set()
    for block in model.blocks():  # type: ignore[operator]  # of a DualEncoder
        inside |= {id(parameter) for parameter in block.parameters()}
    return {n for n, p in model.named_parameters() if id(p) in inside and decays(n, p)}
