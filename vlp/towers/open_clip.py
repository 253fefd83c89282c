"""Any architecture that open_clip knows by name, or describes in a Hub repository or folder; image,
text, or both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlp.pretrained.references import describe
from vlp.schema import plain

_DECIDED_ELSEWHERE = {
    "vision_cfg",
    "text_cfg",
    "custom_text",
    "init_logit_scale",
    "init_logit_bias",
    "nonscalar_logit_scale",
}


@dataclass(frozen=True)
class Options:
    # ViT-B-32, …; FILE.json of your own; hf-hub:user/name or a folder (`pretrained` loads weights)
    architecture: str
    # pixels, one number or [height, width]; None: the architecture's. Positions of `pretrained` or
    # `init_from` are interpolated
    image_size: int | tuple[int, int] | None = None
    context_length: int | None = None  # L; None: the architecture's
    # share of patches left out in training (FLIP); none in evaluation
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"patch_dropout is {self.patch_dropout}; expected a share in [0, 1)")


def vision_cfg(options: Options) -> dict[str, Any]:
    section = _config(options.architecture)["vision_cfg"]
    if options.image_size is not None:
        section["image_size"] = plain(options.image_size)

    if options.patch_dropout:
        section["patch_dropout"] = options.patch_dropout
    return section


def text_cfg(options: Options) -> dict[str, Any]:
    section = _config(options.architecture)["text_cfg"]
    if options.context_length is not None:
        section["context_length"] = options.context_length
    return section


def shared_cfg(options: Options) -> dict[str, Any]:
    """The architecture's other keys, a CoCa's text decoder (`multimodal_cfg`) among them. Scale and
    bias are `vlp.config.Model`'s to say, and so is the class of the model.
    """
    config = _config(options.architecture)
    others = {key: value for key, value in config.items() if key not in _DECIDED_ELSEWHERE}
    return {"quick_gelu": False} | others


def preprocess_cfg(options: Options) -> dict[str, Any]:
    """What the folder or repository says; a name alone says nothing (its weights do: see
    `vlp.pretrained.weight_files`).
    """
    return describe(options.architecture)["preprocess_cfg"]


def _config(architecture: str) -> dict[str, Any]:
    return describe(architecture)["model_cfg"]
