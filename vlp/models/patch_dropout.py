"""Patch dropout that draws where its input lies, in the place of open_clip's (FLIP, Li et al.,
arXiv 2212.00794).
"""

from __future__ import annotations

import torch
from open_clip.transformer import PatchDropout as OpenCLIPPatchDropout
from torch import Tensor, nn


class PatchDropout(nn.Module):
    """In training, keep the class token and a random share of each row's patches.

    [b, 1 + P, width] → [b, 1 + k, width] with k = max(1, ⌊P·(1 − prob)⌋), drawn from the random
    state of the input's device. On a CPU these are bit for bit the patches that open_clip's module
    keeps; on a GPU that one would draw, sort and index on the CPU and wait for the copies.
    """

    def __init__(self, prob: float) -> None:
        super().__init__()
        self.prob = prob

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.training:
            return tokens
        class_token, patches = tokens[:, :1], tokens[:, 1:]

        # The k largest of P independent numbers: a uniform choice, in random order.
        n_rows, n_patches, width = patches.shape
        n_kept = max(1, int(n_patches * (1 - self.prob)))
        numbers = torch.randn(n_rows, n_patches, device=tokens.device)
        kept = numbers.topk(n_kept, dim=1).indices

        kept_patches = patches.gather(1, kept[..., None].expand(-1, -1, width))
        return torch.cat([class_token, kept_patches], dim=1)


def draw_on_device(tower: nn.Module) -> None:
    """Put `PatchDropout` in the place of open_clip's, where this tower has it."""
    drop = getattr(tower, "patch_dropout", None)
    if isinstance(drop, OpenCLIPPatchDropout):
        tower.patch_dropout = PatchDropout(drop.prob)
