"""Image and text towers. open_clip builds them; a file here turns a few options into sections of
its configuration.

A tower file holds a frozen dataclass `Options` and functions of an instance of it, each returning
the section of open_clip_config.json whose name it bears, so that whatever is trained here can be
exported there:

    vision_cfg(options)      the file can be an image tower
    text_cfg(options)        the file can be a text tower
    shared_cfg(options)      optional: top-level keys (embed_dim, quick_gelu, …) that two towers
                             must not contradict
    preprocess_cfg(options)  optional: mean, std, interpolation, resize_mode of the pixels that an
                             image tower expects
    load_weights(options, tower)  optional: reads weights that the options name into the built
                             image tower

A file with both `vision_cfg` and `text_cfg` can stand alone as the image tower.
`vlp.models.assemble` joins the sections; nothing else knows which towers exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Context:
    """A longer context for pretrained weights: the first positions stay, the others are stretched
    (vlp.pretrained.context).
    """

    length: int  # L, begin and end tokens included; Long-CLIP makes 248 of 77
    keep: int = 20  # positions that stay as they are

    def __post_init__(self) -> None:
        if not 0 <= self.keep < self.length:
            raise ValueError(
                f"length is {self.length} and keep {self.keep}; expected 0 <= keep < length"
            )


@dataclass(frozen=True)
class Locked:
    """A tower that is locked up to its last layers (vlp.models.layer_groups)."""

    unlocked_groups: int  # groups of layers that learn, counted from the output

    def __post_init__(self) -> None:
        if self.unlocked_groups < 0:
            raise ValueError(
                f"unlocked_groups is {self.unlocked_groups}; expected the number of groups that "
                "learn, or locked: true for none"
            )


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters of a tower whose own weights stay (vlp.models.lora); needs vlp[lora]."""

    r: int = 8  # rank of an adapter
    alpha: float = 16.0  # an adapter's part is scaled by alpha / r
    dropout: float = 0.0  # of what enters an adapter, in training
    # auto: every linear layer that the tower calls; or regular expressions of the ends of names
    targets: Literal["auto"] | list[str] = "auto"

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"r is {self.r}, alpha {self.alpha} and dropout {self.dropout}; expected r >= 1, "
                "alpha > 0 and 0 <= dropout < 1"
            )
        for target in () if self.targets == "auto" else self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets: {target!r} is no regular expression: {error}") from None
        if not self.targets:
            raise ValueError("targets is empty; name layers, or write auto")


@dataclass(frozen=True)
class Common:
    """Keys that every tower takes."""

    # LiT: the tower keeps its weights, batch statistics included (of a timm or Hugging Face tower
    # the trunk, not its projection); a mapping leaves its last groups of layers open
    locked: bool | Locked = False
    # low-rank adapters learn in the place of the tower's weights; null: none
    lora: Lora | None = None
    # of a locked image tower: training reads its embeddings from the sources' `embeddings`
    precomputed: bool = False
    # of a text tower whose weights `pretrained` or `init_from` bring: a longer context; None: as
    # long as the tower says
    context: Context | None = None
    # of open_clip's text transformer: the share of what enters each block that is dropped in
    # training, so that two passes of a text are two views of it (CLIP-rocket: .2 on CC3M)
    dropout: float = 0.0
    # of an image tower: training computes with weights and inputs of layers rounded to 8 bits, so
    # that it can be quantised (vlp.models.int8_aware; vlp export --onnx --int8)
    int8_aware: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; expected a share in [0, 1)")
        if self.lora is not None and (self.locked is not False or self.precomputed):
            raise ValueError(
                "lora keeps the tower's weights and trains adapters, so the tower can be neither "
                "locked nor precomputed; leave out locked and precomputed, or lora"
            )
        if self.int8_aware and (self.lora is not None or self.locked is True):
            raise ValueError(
                "int8_aware trains the tower's own weights, so the tower can be neither locked as "
                "a whole nor have adapters; leave out int8_aware, or locked and lora"
            )
        if self.precomputed and self.locked is not True:
            raise ValueError(
                "precomputed embeddings stay as they are, so the tower must be locked as a whole: "
                "set locked: true"
            )
