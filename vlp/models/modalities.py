"""Towers of further modalities over rows in time: log-mel frames of a sound, embeddings of a
video's frames, or the one embedding that any other model gave.

Rows of a video's frames may be made in the same pass, by the image tower.

    layers = 0    the mean of a sample's rows, then a linear map
    layers > 0    `patch` rows become a token; tokens pass a transformer, and their mean a linear
                  map. Rows beyond a sample's length have no influence, but for the last, partly
                  filled patch, which is filled up with zeros
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import config


class Tower(nn.Module):
    """[b, T, F] rows and [b] lengths → [b, D] features."""

    def __init__(self, options: config.Modality, embed_dim: int) -> None:
        super().__init__()
        self.options = options
        # Embeddings of frames have as many numbers as the space.
        n_features = embed_dim if options.frames is not None else options.features
        if not options.layers:
            self.projection = nn.Linear(n_features, embed_dim)
            if options.frames is not None:
                # A mean of embeddings already lies where its text's does.
                nn.init.eye_(self.projection.weight)
                nn.init.zeros_(self.projection.bias)
            return

        width = options.width
        self.tokens = nn.Linear(options.patch * n_features, width)
        self.positions = nn.Parameter(0.02 * torch.randn(options.n_tokens, width))
        block = nn.TransformerEncoderLayer(
            width, options.heads, 4 * width, 0.0, _gelu, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            block, options.layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.projection = nn.Linear(width, embed_dim)

    def forward(self, rows: Tensor, lengths: Tensor) -> Tensor:
        # A sample that lacks the modality is embedded as if it had one row, and then left out: a
        # mean over nothing would be NaN.
        lengths = lengths.clamp(min=1)
        if not self.options.layers:
            return self.projection(_mean(rows, lengths))

        patches = rows.unflatten(1, (self.options.n_tokens, self.options.patch)).flatten(2)
        n_tokens = (lengths + self.options.patch - 1) // self.options.patch
        beyond = _beyond(n_tokens, self.options.n_tokens)
        tokens = self.tokens(patches) + self.positions
        tokens = self.transformer(tokens, src_key_padding_mask=beyond)
        return self.projection(_mean(tokens, n_tokens))


class Modalities(nn.Module):
    """The towers of all further modalities, in the order of their names."""

    def __init__(self, options: Mapping[str, config.Modality], embed_dim: int) -> None:
        super().__init__()
        self.options, self.embed_dim = dict(sorted(options.items())), embed_dim
        self.towers = nn.ModuleDict(
            {name: Tower(of_tower, embed_dim) for name, of_tower in self.options.items()}
        )

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(T, F) of each, as the data deliver them."""
        return {name: (tower.length, tower.features) for name, tower in self.options.items()}

    @property
    def n_frames(self) -> int:
        """F, the frames that a video may have; 0: no modality is of frames."""
        return sum(tower.length for tower in self.options.values() if tower.frames is not None)

    def _no_frames(self, empty: Tensor) -> Tensor:
        """Of rows [b, F, 0] the embeddings [b, F, D] of videos that nobody has."""
        return empty.new_zeros(*empty.shape[:2], self.embed_dim)

    def frame_places(self, lengths: np.ndarray) -> np.ndarray:
        """Of lengths [b, O] the numbers of the frames that are there among [b · F]."""
        [video] = [
            place for place, tower in enumerate(self.options.values()) if tower.frames is not None
        ]
        return np.flatnonzero(np.arange(self.n_frames) < lengths[:, video, None])

    def forward(
        self, side_by_side: Tensor, lengths: Tensor, frames: Tensor | None = None
    ) -> Tensor:
        """[b, S] rows of all modalities, [b, O] lengths and [b, F, D] embeddings of frames →
        [b, O, D] features.
        """
        sizes = [length * features for length, features in self.shapes.values()]
        # Engines may have cast the towers.
        dtype = next(self.parameters()).dtype
        parts = side_by_side.to(dtype).split(sizes, 1)
        rows = dict(zip(self.shapes, parts, strict=True))
        features = []
        for place, (name, shape) in enumerate(self.shapes.items()):
            of_one = rows[name].unflatten(1, shape)
            if self.options[name].frames is not None:
                # Who scores other modalities brings none.
                of_one = self._no_frames(of_one) if frames is None else frames.to(dtype)
            features.append(self.towers[name](of_one, lengths[:, place]))
        return torch.stack(features, 1)


def _gelu(x: Tensor) -> Tensor:
    # By torch's own name evaluation would take a fused path, which reads weights past what an
    # engine has wrapped around them.
    return F.gelu(x)


def _mean(rows: Tensor, lengths: Tensor) -> Tensor:
    """The mean of the first rows of each sample, [b, F]."""
    beyond = _beyond(lengths, rows.shape[1])
    # In bfloat16 a sum of many rows ends at 256 times one of them.
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    kept = wide.masked_fill(beyond.unsqueeze(2), 0)
    return (kept.sum(1) / lengths.unsqueeze(1)).to(rows.dtype)


def _beyond(lengths: Tensor, most: int) -> Tensor:
    """Which rows lie beyond a sample's length, [b, most] bool."""
    return torch.arange(most, device=lengths.device) >= lengths.unsqueeze(1)
