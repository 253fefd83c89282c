"""Any timm model as the image tower, projected into the shared space (open_clip's TimmModel)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlp.towers import _trunk

if TYPE_CHECKING:
    from open_clip.timm_model import TimmModel

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
    # the trunk's weights from a file (.safetensors, .pth, …), a folder of timm's form, or
    # package:NAME/FILE of an installed package; a classifier in it is left out
    weights: str | None = None
    # of RGB in [0, 1], as the weights saw it; None: what timm states for them
    mean: tuple[float, float, float] | None = None
    # likewise the standard deviation; None: what timm states for them
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = (
        None  # of the resize; None: what timm states
    )
    # how the trunk's features become one vector; "": the model's own way
    pool: Literal["", "avg", "token", "map", "abs_attn", "rot_attn"] = ""
    # into the shared space; none: the trunk's pooled features are the embedding
    proj: Literal["linear", "mlp", "none"] = "linear"
    # the linear projection has a bias (that of MobileNets, timm's classifier, always has)
    proj_bias: bool = False
    drop: float = 0.0  # dropout before the projection
    drop_path: float | None = None  # stochastic depth of the trunk
    # share of patches left out in training (FLIP), where the model has patches
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.weights is not None and self.pretrained:
            raise ValueError(
                "weights names a file and pretrained downloads timm's own; leave one of them out"
            )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; expected three positive numbers")


def vision_cfg(options: Options) -> dict[str, Any]:
    stated = _stated(options.model)
    image_size = options.image_size or stated.input_size[-1]

    if options.weights is not None:
        _trunk.file_of(options.weights)  # a wrong path shows here, before anything is built

    pool, proj = _head(options)
    section = {
        "timm_model_name": options.model,
        "timm_model_pretrained": options.pretrained,
        "timm_pool": pool,
        "timm_proj": proj,
        "timm_proj_bias": options.proj_bias,
        "timm_drop": options.drop,
        "timm_drop_path": options.drop_path,
        "image_size": plain(image_size),
    }
    if options.patch_dropout:
        section["patch_dropout"] = options.patch_dropout
    return section


def _head(options: Options) -> tuple[str, str]:
    """open_clip's timm_pool and timm_proj."""
    # open_clip's empty projection makes timm's own head the projection: attention pools end with
    # theirs.
    if options.pool in ("abs_attn", "rot_attn"):
        return options.pool, ""

    usual = _trunk.pooling(options.model)
    if usual.n_before == usual.n_after and options.proj != "none":
        return options.pool, options.proj

    # Without a projection open_clip takes an empty pool for none at all, and pixels' rows and
    # columns would leave the tower.
    pool = options.pool or usual.name
    if not pool:
        raise ValueError(
            f"timm does not say how {options.model} pools its features; write pool: avg, token or "
            "map"
        )
    if options.proj == "none":
        return pool, "none"

    # Where layers lie between pool and classifier (MobileNet), open_clip's own projection counts
    # the features in front of them. timm's classifier, of as many outputs as embeddings have,
    # counts right.
    if options.proj == "mlp":
        raise ValueError(
            f"open_clip cannot project timm's {options.model} by an MLP: it takes its features for "
            f"{usual.n_before}, and they are {usual.n_after}; write proj: linear, or none"
        )
    return pool, ""


def preprocess_cfg(options: Options) -> dict[str, Any]:
    """The pixels that the pretrained trunk saw; CLIP's normalisation for a random one."""
    section: dict[str, Any] = {}
    if options.pretrained or options.weights is not None:
        section = _pixels(options)

    # What the configuration says comes before what timm says.
    for name in ("mean", "std", "interpolation"):
        value = getattr(options, name)
        if value is not None:
            section[name] = value if isinstance(value, str) else list(value)
    return section


def _pixels(options: Options) -> dict[str, Any]:
    """What timm states of a trunk's weights, by name and beside their file."""
    stated = _stated(options.model).to_dict()
    if options.weights is not None:
        stated |= _trunk.stated_beside(_trunk.file_of(options.weights))

    # timm may name another one, which vlp's transforms do not have.
    interpolation = stated["interpolation"]
    if interpolation not in ("bicubic", "bilinear"):
        interpolation = "bicubic"
    return {
        "mean": list(stated["mean"]),
        "std": list(stated["std"]),
        "interpolation": interpolation,
    }


def load_weights(options: Options, tower: TimmModel) -> None:
    """Read the file that `weights` names into the built tower's trunk."""
    if options.weights is not None:
        _trunk.load_into(tower.trunk, options.model, _trunk.file_of(options.weights))


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
