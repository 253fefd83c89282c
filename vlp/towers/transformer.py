"""A causal text transformer of any size from scratch, on CLIP's tokens (open_clip's
TextTransformer; Radford et al. 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    width: int  # of a token
    layers: int  # transformer blocks
    heads: int  # attention heads; must divide width
    context_length: int = 77  # L, begin and end tokens included
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / width
    # the embedding is read at a learned token behind the text (CoCa), not at the end token, and
    # captions are not cut to their length
    class_token: bool = False
    quick_gelu: bool = False  # OpenAI's x·σ(1.702x) instead of GELU

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads) < 1 or self.mlp_ratio <= 0:
            raise ValueError("width, layers, heads and mlp_ratio must be positive")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.context_length < 3:
            raise ValueError(
                f"context_length is {self.context_length}; begin, end and one word need at least 3"
            )


def text_cfg(options: Options) -> dict[str, Any]:
    section = {
        "context_length": options.context_length,
        "vocab_size": 49408,  # of CLIP's byte-pair vocabulary, which is the tokenizer of this tower
        "width": options.width,
        "heads": options.heads,
        "layers": options.layers,
        "mlp_ratio": options.mlp_ratio,
    }
    if options.class_token:
        section["embed_cls"] = True
    return section


def shared_cfg(options: Options) -> dict[str, Any]:
    return {"quick_gelu": options.quick_gelu}
