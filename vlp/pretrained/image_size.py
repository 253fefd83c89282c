"""An image tower for pictures of another size: its position embeddings are interpolated.

    open_clip's vision transformer   bicubic with antialiasing over the grid of patches, the class
                                     token's kept: open_clip's resize_pos_embed
    open_clip's ResNet               the same, over the grid of its attention pool; square only
    timm's towers                    timm's own set_input_size: positions, relative positions,
                                     windows
    timm's convolutional towers      nothing: they have no positions

Weights of any known size are read at that size first, and the tower is resized after that, so that
files and models in memory go one way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

Size = tuple[int, int]  # height and width, in pixels

RESNET_STRIDE = 32  # pixels a side of a place in the attention pool
_POSITIONS = {
    VisionTransformer: "visual.positional_embedding",
    ModifiedResNet: "visual.attnpool.positional_embedding",
    TimmModel: "visual.trunk.pos_embed",
}


def pair(size: Any) -> Size:
    """(height, width) of one number, or of a sequence of two."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def shown(size: Size) -> str:
    """A size for a message."""
    height, width = size
    return str(height) if height == width else f"{height} x {width}"


def stride(tower: nn.Module) -> Size | None:
    """Pixels a place of the tower's grid, which must divide a picture; None where any size fits."""
    if isinstance(tower, VisionTransformer):
        return pair(tower.patch_size)
    if isinstance(tower, ModifiedResNet):
        return RESNET_STRIDE, RESNET_STRIDE
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "set_input_size"):
        patches: Any = getattr(tower.trunk, "patch_embed", None)
        return pair(patches.patch_size) if hasattr(patches, "patch_size") else None
    return None


def check(tower: nn.Module, size: Size, name: str) -> None:
    """Raise ValueError where the tower cannot read pictures of that size; the message names sizes
    that work.
    """
    if min(size) < 1:
        raise ValueError(f"image_size is {shown(size)}; expected pixels, at least 1")
    step = stride(tower)
    if step is not None and any(pixels % part or not pixels for pixels, part in zip(size, step)):
        nearest = [
            (max(1, round(pixels / part)) * part, (pixels // part + 1) * part)
            for pixels, part in zip(size, step)
        ]
        lower, higher = (shown(pair(sides)) for sides in zip(*nearest))
        near = lower if lower == higher else f"{lower} or {higher}"
        raise ValueError(
            f"image_size {shown(size)} is not divisible by the patches of {name}, "
            f"{shown(step)} pixels; sizes that work are {near}"
        )


def check_square(vision_cfg: Mapping[str, Any]) -> None:
    """Raise ValueError for a section of an open_clip ResNet that is not square: open_clip builds
    its attention pool from one number.
    """
    if not isinstance(vision_cfg.get("layers"), (list, tuple)):
        return
    height, width = pair(vision_cfg["image_size"])
    if height != width:
        raise ValueError(
            f"image_size is {height} x {width}, and the attention pool of open_clip's ResNets is "
            f"square; sizes that work are {height} and {width}"
        )


def resize(tower: nn.Module, size: Size) -> None:
    """Let the tower read pictures of that size; its positions are interpolated."""
    current = pair(tower.image_size)
    if current == size:
        return

    if isinstance(tower, TimmModel):
        # What has no such method has no positions, and only notes the size.
        tower.set_input_size(size)
        return
    if not isinstance(tower, (VisionTransformer, ModifiedResNet)):
        raise ValueError(f"the image tower, a {type(tower).__name__}, has a fixed size")

    owner = tower.attnpool if isinstance(tower, ModifiedResNet) else tower
    positions = owner.positional_embedding
    resampled = interpolated(positions.detach(), grid(tower, current), grid(tower, size))
    owner.positional_embedding = nn.Parameter(resampled, positions.requires_grad)
    if isinstance(tower, VisionTransformer):
        tower.grid_size, tower.image_size = grid(tower, size), size
    else:
        tower.image_size = size[0]


def grid(tower: nn.Module, size: Size) -> Size:
    """Places of positions that a picture of that size has in the tower."""
    step = stride(tower)
    assert step is not None
    return size[0] // step[0], size[1] // step[1]


def interpolated(positions: Tensor, old: Size, new: Size, n_before: int = 1) -> Tensor:
    """Positions [..., n_before + P, width] of tokens before a grid `old`, which stay, and of the
    grid, as those of a grid `new`; in their dtype.
    """
    rows = positions.reshape(-1, positions.shape[-1])
    places = rows[n_before:].float()
    planes = places.reshape(1, *old, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=new, mode="bicubic", antialias=True, align_corners=False)

    resampled = planes.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)
    joined = torch.cat([rows[:n_before], resampled])
    return joined.reshape(*positions.shape[:-2], *joined.shape)


def fitted(weights: Mapping[str, Tensor], tower: nn.Module, old: Size) -> dict[str, Tensor]:
    """Weights, averages or moments by the names of a model that was trained on pictures of `old`,
    with the positions of its image tower for the size of `tower`; all else as it is.

    Positions of which the grids do not tell how many stand before them stay, too: their shape
    shows that they do not fit.
    """
    size, name = pair(tower.image_size), _POSITIONS.get(type(tower), "")
    if size == old or name not in weights or stride(tower) is None:
        return dict(weights)

    # Class and register tokens: as many as the old grid leaves.
    positions, old_grid = weights[name], grid(tower, old)
    n_before = positions.shape[-2] - math.prod(old_grid)
    if n_before < 0:
        return dict(weights)
    return {**weights, name: interpolated(positions, old_grid, grid(tower, size), n_before)}


def of_weights(tower: nn.Module, weights: Mapping[str, Tensor], stated: Any = None) -> Size:
    """The size of pictures that weights were trained on, as far as their positions tell.

    `stated`: what is said beside the weights, which decides between grids of as many places; else
    the tower's own size does, and after that a square.
    """
    current = pair(tower.image_size)
    positions = _positions(tower, weights)
    if positions is None:
        return _of_trunk(tower, weights, current)

    likely = [current] if stated is None else [pair(stated), current]
    for size in likely:
        if math.prod(grid(tower, size)) == positions:
            return size

    # open_clip's weights without a description are square.
    side = math.isqrt(positions)
    if side * side != positions:
        raise ValueError(
            f"the weights have positions of {positions} places, which are no square; name the "
            "folder that describes them, with their image_size"
        )
    step = stride(tower)
    assert step is not None
    return side * step[0], side * step[1]


def _positions(tower: nn.Module, weights: Mapping[str, Tensor]) -> int | None:
    """How many places the grid of weights has; None where they have no table of positions."""
    name = _POSITIONS.get(type(tower))
    table = None if name is None else weights.get(name)
    if table is None or stride(tower) is None:
        return None
    if not isinstance(tower, TimmModel):
        return len(table) - 1

    # The tower's own table tells how many of its rows are no places: class and register tokens.
    of_tower = getattr(tower.trunk, "pos_embed", None)
    if of_tower is None:
        return None
    n_prefix = of_tower.shape[1] - math.prod(tower.trunk.patch_embed.grid_size)
    return table.shape[1] - n_prefix


def _of_trunk(tower: nn.Module, weights: Mapping[str, Tensor], current: Size) -> Size:
    """The size of weights without absolute positions: the tower's, or, where these do not fit it
    and belong to a timm trunk, what timm made the trunk for.
    """
    if not isinstance(tower, TimmModel) or not hasattr(tower.trunk, "set_input_size"):
        return current

    # Tables of relative positions have other shapes in other windows.
    fits = all(
        weights[f"visual.trunk.{name}"].shape == value.shape
        for name, value in tower.trunk.state_dict().items()
        if f"visual.trunk.{name}" in weights
    )
    return current if fits else _default(tower)


def is_default(tower: nn.Module) -> bool:
    """Whether open_clip builds the tower at its size: of timm's with positions only at timm's."""
    if not isinstance(tower, TimmModel) or not hasattr(tower.trunk, "set_input_size"):
        return True
    return pair(tower.image_size) == _default(tower)


def _default(tower: TimmModel) -> Size:
    """The size for which timm makes the trunk."""
    return pair(tower.trunk.default_cfg["input_size"][-2:])


def set_up(tower: nn.Module, name: str) -> None:
    """Bring a tower that was just built to the size that its description states; ValueError where
    it has no such size.

    open_clip notes the size of a timm tower and leaves the trunk as timm has it.
    """
    size = pair(tower.image_size)
    check(tower, size, name)
    if is_default(tower):
        return

    # Whether windows and grids fit shows when the tower runs; later it would stop a run.
    assert isinstance(tower, TimmModel)
    try:
        tower.set_input_size(size)
        _try(tower, size)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{name} cannot read pictures of {shown(size)} pixels ({error}); a size that works is "
            f"{shown(_default(tower))}, for which timm made it"
        ) from error


@torch.no_grad()
def _try(tower: TimmModel, size: Size) -> None:
    """Run the tower once; random numbers and statistics stay as they are."""
    was_training = tower.training
    tower.eval()(torch.zeros(1, 3, *size))
    tower.train(was_training)
