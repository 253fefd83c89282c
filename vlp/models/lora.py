"""Low-rank adapters of a tower's linear layers (LoRA, Hu et al., arXiv 2106.09685), by peft.

    W' = W + (alpha/r)·B·A,   A [r, in] random, B [out, r] zeros: at the start W' = W

The tower's own weights stay; A and B learn, and what a lock leaves open: the projection of a timm
or Hugging Face tower, and a new one. A checkpoint holds W, A and B, so that it resumes by itself;
whatever reads a checkpoint as a model (evaluation, export, teacher, init_from) gets W', without
peft, in a plain tower.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vlp.models.attention import use_linear_layers
from vlp.models.batch_norm import batch_norms
from vlp.models.layer_groups import trunk_of
from vlp.models.multimodal import ImageTower


def check_installed() -> None:
    """ValueError with the line that installs peft, where it is absent."""
    if find_spec("peft") is None:
        raise ValueError("lora needs the package peft; install it with pip install 'vlp[lora]'")


def adapt(
    tower: nn.Module, options: Any, example: Tensor, name: str, learns: nn.Module | None = None
) -> list[nn.Module]:
    """Give the tower adapters by `options` (vlp.towers.Lora) and freeze all else of its trunk but
    `learns`, a part of it that is trained whole.

    `example`: an input, by which layers are found that are called at all. Returns the batch norms,
    whose statistics have to stay as well. ValueError for targets that match no layer lists those
    that exist.
    """
    from peft import LoraConfig, inject_adapter_in_model

    use_linear_layers(tower)
    trunk = trunk_of(tower)
    whole = set() if learns is None else set(learns.modules())
    called = _called(tower, trunk, example)
    # LLaVA calls a layer whose outputs it drops: DDP would wait for its adapters' gradients.
    unread = tower.unread if isinstance(tower, ImageTower) else frozenset()
    layers = [
        layer for layer in called if trunk.get_submodule(layer) not in whole and layer not in unread
    ]
    targets = _chosen(layers, options.targets, name)

    # Names as they are: peft would take a list for endings.
    pattern = "|".join(re.escape(target) for target in targets)
    settings = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=f"({pattern})",
    )
    trunk.requires_grad_(False)
    inject_adapter_in_model(settings, trunk)
    if learns is not None:
        learns.requires_grad_(True)
    return list(batch_norms(trunk))


def _called(tower: nn.Module, trunk: nn.Module, example: Tensor) -> list[str]:
    """The linear layers of the trunk that a forward pass calls, by name.

    Some are only read (torch's attention, timm's BEiT with biases of its own): an adapter around
    them would do nothing, in silence.
    """
    names = {module: name for name, module in trunk.named_modules() if type(module) is nn.Linear}
    seen: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.add(names[module]))
        for module in names
    ]
    was_training = tower.training
    with torch.no_grad():
        tower.eval()(example)
    tower.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name in names.values() if name in seen]


def _chosen(layers: list[str], targets: Any, tower: str) -> list[str]:
    """The layers that targets mean: all of them, or those whose ends the expressions match."""
    kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "N", f".{name}")[1:] for name in layers})
    exist = ", ".join(kinds) or "none; lock groups of its layers instead"
    if not layers:
        raise ValueError(
            f"{tower}.lora: the tower calls no linear layer; found {exist} "
            f"(locked: {{unlocked_groups: 2}})"
        )
    if targets == "auto":
        return layers

    chosen: set[str] = set()
    for target in targets:
        matching = [name for name in layers if re.search(rf"(^|\.)(?:{target})$", name)]
        if not matching:
            raise ValueError(
                f"{tower}.lora.targets: {target!r} matches no linear layer that the tower calls; "
                f"found {exist}"
            )
        chosen |= set(matching)
    return [name for name in layers if name in chosen]
