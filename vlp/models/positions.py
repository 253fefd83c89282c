"""Position embeddings of an image tower for another size of pictures.

The grid is interpolated (bicubic, antialiased, as open_clip and timm do it when weights of another
size are loaded), and tokens that stand before it, such as the class token, stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_BEFORE = 8  # class and register tokens

# By the names of open_clip's towers, its ResNets' attention pool, and timm's.
NAMES = (
    "visual.positional_embedding",
    "visual.attnpool.positional_embedding",
    "visual.trunk.pos_embed",
)


def grids(old: int, new: int) -> tuple[int, int, int] | None:
    """(tokens before the grid, side of the old grid, side of the new one) of so many positions;
    None where they are no square grids.
    """
    for before in range(_MOST_BEFORE + 1):
        sides = [math.isqrt(max(0, n - before)) for n in (old, new)]
        if all(side and side**2 + before == n for side, n in zip(sides, (old, new))):
            return before, sides[0], sides[1]
    return None


def resized(positions: Tensor, n: int) -> Tensor:
    """Positions [L, D] or [1, L, D] as `n` ones, in their dtype."""
    found = grids(positions.shape[-2], n)
    if found is None:
        raise ValueError(
            f"{positions.shape[-2]} positions are no square grid that could become one of {n}"
        )
    before, old, new = found

    rows = positions.reshape(-1, positions.shape[-1])
    grid = rows[before:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    new_rows = grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(positions.dtype)
    joined = torch.cat([rows[:before], new_rows])
    return joined.reshape(*positions.shape[:-2], n, positions.shape[-1])


def fitted(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose positions have the shapes of `expected`; all others as they are."""
    changed = dict(weights)
    for name in NAMES:
        if name in weights and name in expected and weights[name].shape != expected[name].shape:
            changed[name] = resized(weights[name], expected[name].shape[-2])
    return changed
