"""Any timm model as the image tower, projected into the shared space (open_clip's TimmModel)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from vlp.schema import plain


@dataclass(frozen=True)
class Options:
    # timm's name, optionally with a tag of weights: resnet50, convnext_tiny.fb_in22k
    model: str
    # pixels, one number or [height, width]; None: what timm states for the model. Positions of
    # published weights are interpolated by timm
    image_size: int | tuple[int, int] | None = None
    # timm's own weights (downloaded); without them the trunk starts at random
    pretrained: bool = False
    # how the trunk's features become one vector; "": the model's own way
    pool: Literal["", "avg", "token", "map", "abs_attn", "rot_attn"] = ""
    # into the shared space; none: the trunk's features are the embedding
    proj: Literal["linear", "mlp", "none"] = "linear"
    proj_bias: bool = False  # the linear projection has a bias
    drop: float = 0.0  # dropout before the projection
    drop_path: float | None = None  # stochastic depth of the trunk
    # share of patches left out in training (FLIP), where the model has patches
    patch_dropout: float = 0.0


def vision_cfg(options: Options) -> dict[str, Any]:
    stated = _stated(options.model)
    image_size = options.image_size or stated.input_size[-1]

    # open_clip's empty projection makes timm's own head the projection: attention pools end with
    # theirs.
    attention_pool = options.pool in ("abs_attn", "rot_attn")
    section = {
        "timm_model_name": options.model,
        "timm_model_pretrained": options.pretrained,
        "timm_pool": options.pool,
        "timm_proj": "" if attention_pool else options.proj,
        "timm_proj_bias": options.proj_bias,
        "timm_drop": options.drop,
        "timm_drop_path": options.drop_path,
        "image_size": plain(image_size),
    }
    if options.patch_dropout:
        section["patch_dropout"] = options.patch_dropout
    return section


def preprocess_cfg(options: Options) -> dict[str, Any]:
    """The pixels that the pretrained trunk saw; CLIP's normalisation for a random one."""
    if not options.pretrained:
        return {}
    stated = _stated(options.model)

    # timm may name another one, which vlp's transforms do not have.
    known = stated.interpolation in ("bicubic", "bilinear")
    interpolation = stated.interpolation if known else "bicubic"
    return {"mean": list(stated.mean), "std": list(stated.std), "interpolation": interpolation}


def _stated(model: str) -> Any:
    import timm

    name, _, tag = model.partition(".")
    if not timm.is_model(model):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"close to it: {', '.join(close)}" if close else "timm.list_models() has them"
        raise ValueError(f"timm knows no model {model!r}; {hint}")

    try:
        return timm.get_pretrained_cfg(model)
    except RuntimeError:
        known = timm.list_pretrained(f"{name}.*")
        raise ValueError(
            f"timm's {name} has no tag {tag!r}; found {', '.join(known) or 'none'}"
        ) from None
