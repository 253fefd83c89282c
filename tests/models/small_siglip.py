"""timm's part of the small SigLIP; imports nothing of vlp, for processes that cannot."""

from __future__ import annotations

from typing import Any


def register_small_siglip() -> None:
    """Teach timm a vision transformer of SigLIP's form that is small; its own smallest has 93
    million weights.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def vit_small_for_tests(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        given = {key: kwargs[key] for key in ("num_classes", "global_pool") if key in kwargs}
        keys = {"global_pool": "map"} | given  # as timm's SigLIP towers pool by themselves
        made = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, class_token=False, **keys
        )
        made.default_cfg = {"input_size": (3, 32, 32)}
        return made

    def vit_small_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        return vit_small_for_tests(**kwargs)

    for made in (vit_small_for_tests, vit_small_siglip_32):
        if not timm.is_model(made.__name__):
            timm.models.register_model(made)
