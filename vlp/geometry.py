"""How two sets of embeddings lie in their space: one definition for training and evaluation.

    modality gap  ‖mean_i x_i − mean_i t_i‖₂                (Liang et al. 2022, arXiv 2203.02053)
    alignment     mean_i ‖x_i − t_i‖²                        (Wang and Isola 2020, arXiv 2005.10242,
    uniformity    log mean_{i<j} e^{−t‖x_i − x_j‖²}           with α = 2 and t = 2)

Rows are unit rows [n, D] of any floating-point dtype, in which the numbers are computed. Each
function returns a tensor [] on the device of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ROWS = 1024  # a tile of pairs is 4 MiB in float32


def modality_gap(image: Tensor, text: Tensor) -> Tensor:
    """The distance of the centroids of images and texts; 0 where they coincide."""
    return (image.mean(0) - text.mean(0)).norm()


def alignment(image: Tensor, text: Tensor) -> Tensor:
    """The mean squared distance of pairs; lower is better."""
    return (image - text).square().sum(1).mean()


def uniformity(rows: Tensor, t: float = 2.0) -> Tensor:
    """The log-mean kernel of all pairs of rows; lower is better, 0 where all rows are one.

    Raises ValueError for fewer than two rows.
    """
    n = len(rows)
    if n < 2:
        raise ValueError(f"uniformity needs at least two rows, found {n}")

    total = rows.new_zeros(())
    tiles = rows.split(TILE_ROWS)
    for i, tile in enumerate(tiles):
        for j in range(i, len(tiles)):
            cosines = tile @ tiles[j].T
            if i == j:
                # Each unordered pair once, and no row with itself: those lie above the diagonal.
                cosines = cosines[torch.ones_like(cosines, dtype=torch.bool).triu(1)]
            squared_distances = 2 - 2 * cosines
            total = total + (-t * squared_distances).exp().sum()
    return (total / (n * (n - 1) / 2)).log()
