"""The layers of a tower from its input to its output, in the groups that a lock can leave open.

open_clip's vision transformer   stem; each block; the last one with the norm behind it; the
                                 projection: open_clip's groups
open_clip's ResNet               stem; layer1 … layer4; the attention pool
open_clip's text transformer     embeddings; each block; the last norm; the projection
timm                             the trunk's own groups (its group_matcher); the projection
                                 always learns
Hugging Face, and any other      what comes before the blocks; each block; what comes after
                                 them; the projection always learns
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import nn

from vlp.models.language import LanguageTower
from vlp.models.multimodal import ImageTower
from vlp.models.repeated import repeated

_AFTER = "after the blocks"


@dataclass(frozen=True)
class LayerGroup:
    """Parameters of a tower that are locked or left open together."""

    name: str
    parameters: tuple[nn.Parameter, ...]


def layer_groups(tower: nn.Module) -> list[LayerGroup]:
    """The groups of a tower, from its input to its output, of every parameter that a lock reaches
    exactly once.
    """
    if isinstance(tower, TimmModel):
        return _of_timm(tower.trunk)
    if isinstance(tower, ModifiedResNet):
        return _of_resnet(tower)
    if isinstance(tower, VisionTransformer | TextTransformer):
        return _of_open_clip(tower)
    return _around_blocks(trunk_of(tower))


def trunk_of(tower: nn.Module) -> nn.Module:
    """What a lock freezes of a tower: without the projection where that is a part of its own."""
    if isinstance(tower, TimmModel):
        return tower.trunk
    if isinstance(tower, HFTextEncoder | LanguageTower):
        return tower.transformer
    if isinstance(tower, ImageTower):
        return tower.model
    return tower


def locked_parameters(tower: nn.Module, unlocked_groups: int, name: str) -> list[nn.Parameter]:
    """The parameters of all groups but the last `unlocked_groups`; ValueError where these are all
    there are.
    """
    groups = layer_groups(tower)
    if unlocked_groups >= len(groups):
        names = ", ".join(group.name for group in groups)
        raise ValueError(
            f"{name}.locked.unlocked_groups is {unlocked_groups}, and the tower has {len(groups)} "
            f"groups: {names}; write {len(groups) - 1} or fewer, or locked: false to train it all"
        )
    kept = groups[: len(groups) - unlocked_groups]
    return [parameter for group in kept for parameter in group.parameters]


def describe(tower: nn.Module) -> list[str]:
    """One line a group, from input to output: its number from the end, parameters and state."""
    groups = layer_groups(tower)
    lines = []
    for number, group in zip(range(len(groups), 0, -1), groups):
        n_parameters = sum(parameter.numel() for parameter in group.parameters)
        learns = any(parameter.requires_grad for parameter in group.parameters)
        state = "learns" if learns else "locked"
        lines.append(f"{number:>3} {group.name}: {n_parameters:,} parameters, {state}")
    return lines


def _of_timm(trunk: Any) -> list[LayerGroup]:
    from timm.models import group_parameters

    by_number = group_parameters(trunk, trunk.group_matcher(coarse=False))
    return [_group(_shared_name(names), trunk, names) for _, names in sorted(by_number.items())]


def _shared_name(names: list[str]) -> str:
    """The module in which all of these parameters lie, or the first of several."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or names[0].partition(".")[0]


def _of_resnet(tower: ModifiedResNet) -> list[LayerGroup]:
    stages = ("layer1", "layer2", "layer3", "layer4", "attnpool")
    names = [name for name, _ in tower.named_parameters()]
    stem = [name for name in names if not name.startswith(stages)]
    groups = [_group("stem", tower, stem)]
    for stage in stages:
        groups.append(_group(stage, tower, [name for name in names if name.startswith(stage)]))
    return groups


def _of_open_clip(tower: VisionTransformer | TextTransformer) -> list[LayerGroup]:
    groups = _around_blocks(tower, apart=("proj", "text_projection"))

    # open_clip's last block goes with the norm behind it.
    i = next(i for i, group in enumerate(groups) if group.name == _AFTER)
    last, norm = groups[i - 1 : i + 1]
    joined = LayerGroup(f"{last.name} and the norm", last.parameters + norm.parameters)
    return [*groups[: i - 1], joined, *groups[i + 1 :]]


def _around_blocks(tower: nn.Module, apart: tuple[str, ...] = ()) -> list[LayerGroup]:
    """What comes before the blocks of a tower, each block, and what comes after them."""
    blocks = {id(block): block for block in repeated(tower)}
    block_of = {}
    for name, module in tower.named_modules():
        if id(module) in blocks:
            block_of[name] = module

    before: list[str] = []
    after: list[str] = []
    last: list[str] = []
    passed = False
    for name, _ in tower.named_parameters():
        in_block = any(name.startswith(f"{block}.") for block in block_of)
        passed = passed or in_block
        if in_block:
            continue
        if name.partition(".")[0] in apart:
            last.append(name)
        elif passed and not _enters(name):
            after.append(name)
        else:
            before.append(name)

    groups = [_group("embeddings", tower, before)]
    for block in block_of:
        members = [name for name, _ in tower.named_parameters() if name.startswith(f"{block}.")]
        groups.append(_group(block, tower, members))
    groups.append(_group(_AFTER, tower, after))
    groups.append(_group("projection", tower, last))
    return [group for group in groups if group.parameters]


def _enters(name: str) -> bool:
    """Whether a parameter belongs to the input wherever it is registered: parameters of a module
    come before those of its parts, and open_clip's embeddings behind them.
    """
    return "embed" in name or name.startswith(("conv1.", "ln_pre."))


def _group(name: str, tower: nn.Module, names: list[str]) -> LayerGroup:
    return LayerGroup(name, tuple(tower.get_parameter(part) for part in names))
