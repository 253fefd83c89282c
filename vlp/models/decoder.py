"""A text decoder that looks at a picture: of each token of a caption, −log p of the next one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import MultimodalTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 1 << 28  # of the logits in float32 that are held at once


class Decoder(MultimodalTransformer):
    """open_clip's decoder over text and image tokens, which gives the loss of each token instead of
    its logits: those of 256 captions would be 4 GB.
    """

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, targets: Tensor) -> Tensor:
        """−log p of `targets` [b, L], each at its position, [b, L]."""
        length = text_tokens.shape[1]
        mask = self.attn_mask[:length, :length]

        x = text_tokens
        for block, cross_block in zip(self.resblocks, self.cross_attn):
            x = self._passed(block, x, None, None, mask)
            x = self._passed(cross_block, x, image_tokens, image_tokens, None)
        rows = self.ln_final(x).flatten(0, 1)

        # A chunk of logits at a time, which the backward pass computes again.
        flat_targets = targets.flatten()
        n_rows = max(1, LOGITS_BYTES // (4 * self.text_projection.shape[1]))
        if len(rows) <= n_rows:
            return _nll(rows, self.text_projection, flat_targets).view(targets.shape)
        chunks = [
            checkpoint(_nll, part, self.text_projection, of_part, use_reentrant=False)
            for part, of_part in zip(rows.split(n_rows), flat_targets.split(n_rows))
        ]
        return torch.cat(chunks).view(targets.shape)

    def _passed(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Through one block, whose activations are computed again where that was asked for."""
        if self.grad_checkpointing:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def _nll(rows: Tensor, projection: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(rows · projection)[targets], [n], of rows [n, width]."""
    return F.cross_entropy(rows @ projection, targets, reduction="none")
