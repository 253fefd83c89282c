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

A file with both `vision_cfg` and `text_cfg` can stand alone as the image tower.
`vlp.models.assemble` joins the sections; nothing else knows which towers exist.
"""

from __future__ import annotations

from dataclasses import dataclass


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
class Common:
    """Keys that every tower takes."""

    # LiT: the tower keeps its weights, batch statistics included (of a timm or Hugging Face tower
    # the trunk, not its projection); a mapping leaves its last groups of layers open
    locked: bool | Locked = False
    # of a locked image tower: training reads its embeddings from the sources' `embeddings`
    precomputed: bool = False
    # of a text tower whose weights `pretrained` or `init_from` bring: a longer context; None: as
    # long as the tower says
    context: Context | None = None

    def __post_init__(self) -> None:
        if self.precomputed and self.locked is not True:
            raise ValueError(
                "precomputed embeddings stay as they are, so the tower must be locked as a whole: "
                "set locked: true"
            )
