"""A vision transformer of any size from scratch (open_clip's VisionTransformer; Dosovitskiy et al.
2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vlp.schema import plain


@dataclass(frozen=True)
class Options:
    width: int  # of a token
    layers: int  # transformer blocks
    patch_size: int  # pixels, square; must divide image_size
    image_size: int | tuple[int, int]  # pixels, one number or [height, width]
    head_width: int = 64  # width of one attention head
    mlp_ratio: float = 4.0  # hidden width of a block's MLP / width
    # class token, or mean over patches (exported to open_clip only)
    pool: Literal["tok", "avg"] = "tok"
    # learned queries over the patches, for the embedding and for a text decoder (CoCa). shared: the
    # first is the embedding's (open_clip's coca_ViT); parallel: one more, over the patches;
    # cascade: one more, over what the others give; both need width = embed_dim. null: no queries
    attentional_pool: Literal["shared", "parallel", "cascade"] | None = None
    pool_queries: int = 256  # of an attentional pool, for the text decoder
    pool_heads: int = 8  # of its attention; must divide embed_dim
    # share of patches left out in training (FLIP); none in evaluation
    patch_dropout: float = 0.0
    quick_gelu: bool = False  # OpenAI's x·σ(1.702x) instead of GELU

    def __post_init__(self) -> None:
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        sizes = (self.width, self.layers, self.patch_size, *sides, self.head_width)
        if min(sizes) < 1 or self.mlp_ratio <= 0:
            raise ValueError(
                "width, layers, patch_size, image_size, head_width and mlp_ratio must be positive"
            )
        # With one query shared by both, nothing would be left for the decoder.
        least_queries = 2 if self.attentional_pool == "shared" else 1
        if self.pool_queries < least_queries or self.pool_heads < 1:
            raise ValueError(
                f"pool_queries is {self.pool_queries} and pool_heads {self.pool_heads}; expected "
                f"at least {least_queries} and 1"
            )
        if self.width % self.head_width:
            raise ValueError(f"head_width {self.head_width} does not divide width {self.width}")
        if any(side % self.patch_size for side in sides):
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; expected a share in [0, 1)")


def vision_cfg(options: Options) -> dict[str, Any]:
    section = {
        "image_size": plain(options.image_size),
        "layers": options.layers,
        "width": options.width,
        "head_width": options.head_width,
        "patch_size": options.patch_size,
        "mlp_ratio": options.mlp_ratio,
        "pool_type": options.pool,
        "patch_dropout": options.patch_dropout,
    }
    if options.attentional_pool is None:
        return section
    is_shared = options.attentional_pool == "shared"
    return section | {
        "attentional_pool": True if is_shared else options.attentional_pool,
        "attn_pooler_queries": options.pool_queries,
        "attn_pooler_heads": options.pool_heads,
    }


def shared_cfg(options: Options) -> dict[str, Any]:
    return {"quick_gelu": options.quick_gelu}
