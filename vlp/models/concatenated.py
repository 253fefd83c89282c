"""Several dual encoders as one model: their embeddings, one after another (MCL's stages, arXiv
2402.11816).

    z = [z_1; …; z_S] / √S, so that a cosine is the mean of the members' cosines;
    scale and bias are the means of the members' (the bias only where all have one).

A folder of such a model holds vlp_stages.json, {"members": ["stage_1", …]}, and each member as `vlp
export` writes it, which other libraries load by itself. `vlp.models.load` and all that takes a
model by name read the folder as one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vlp.data.text import same_tokens
from vlp.models.dual_encoder import DualEncoder
from vlp.models.lengths import Cut
from vlp.types import Features


class Concatenated(nn.Module):
    """Dual encoders of the same pixels and tokens, concatenated; called as a DualEncoder is."""

    def __init__(self, members: Sequence[DualEncoder]) -> None:
        super().__init__()
        first, *others = members
        for other in others:
            same_pixels = other.image_spec == first.image_spec
            if not same_pixels or not same_tokens(other.text_spec, first.text_spec):
                raise ValueError(
                    "models that become one must read the same pixels and tokens, but these read "
                    f"{first.image_spec}, {first.text_spec} and "
                    f"{other.image_spec}, {other.text_spec}; train them alike"
                )

        self.members: Sequence[DualEncoder] = nn.ModuleList(members)  # type: ignore[assignment]
        self.image_spec, self.text_spec = first.image_spec, first.text_spec
        self.embed_dim = sum(member.embed_dim for member in members)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        pairs: int = 0,
        cut: Cut | None = None,
    ) -> Features:
        """Embed what is given, as `DualEncoder.forward` does. `pairs` is for heads, which exports
        do not have.
        """
        outputs = [member(image, text, cut=cut) for member in self.members]

        # A mean over some of the members would belong to none of the models.
        biases = [output.bias for output in outputs]
        bias = None
        if all(value is not None for value in biases):
            bias = torch.stack(biases).mean()

        return Features(
            image=None if image is None else _joined([output.image for output in outputs]),
            text=None if text is None else _joined([output.text for output in outputs]),
            scale=torch.stack([output.scale for output in outputs]).mean(),
            bias=bias,
        )

    def cut(self, ids: np.ndarray, device: torch.device, n_possible: int) -> Cut | None:
        """As `DualEncoder.cut`, where one cut serves all members."""
        first, *others = self.members
        if any(other.padding != first.padding for other in others):
            return None
        return first.cut(ids, device, n_possible)

    def encode_image(self, image: Tensor) -> Tensor:
        """[b, 3, H, W] → [b, ΣD] unit rows."""
        return _joined([member.encode_image(image) for member in self.members])

    def encode_text(self, text: Tensor) -> Tensor:
        """[rows, L] → [rows, ΣD] unit rows."""
        return _joined([member.encode_text(text) for member in self.members])


def _joined(parts: list[Tensor]) -> Tensor:
    # Unit rows again: each part has norm 1.
    return torch.cat(parts, dim=-1) / len(parts) ** 0.5
