"""What timm does not state about its models by name, and weights of a trunk from a file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlp.pretrained import efficientnet_layout, packages, places
from vlp.pretrained.folders import listing, read_json


@dataclass(frozen=True)
class Pooling:
    """How a timm model makes one vector of its features."""

    name: str  # timm's: avg, token, map, …; "" where it cannot be told
    n_before: int  # width of the features that are pooled
    n_after: int  # width of what the classifier reads: other where layers lie between (MobileNet)


@cache
def pooling(model: str) -> Pooling:
    """The pooling that timm gives a model by default."""
    import timm

    # Nothing is computed on this device: the modules alone are asked.
    trunk: Any
    with torch.device("meta"):
        trunk = timm.create_model(model)
    pool = getattr(trunk, "global_pool", None)
    if pool is None or isinstance(pool, nn.Identity):
        pool = getattr(getattr(trunk, "head", None), "global_pool", None)
    name = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")

    n_features = trunk.num_features
    return Pooling(name, n_features, getattr(trunk, "head_hidden_size", n_features))


def file_of(reference: str) -> Path:
    """The file of weights that the option `weights` names; ValueError for none."""
    from vlp.pretrained import weight_files

    place = Path(packages.local(reference)).expanduser()
    # A folder as timm's repositories are: config.json beside the weights.
    if place.is_dir():
        return weight_files.weights_in(place, "transformers")
    if not place.is_file():
        raise ValueError(
            f"weights: no file {place}; its folder holds {listing(place.parent)}. Expected a file "
            "of the trunk's weights, a folder with one, or package:NAME/FILE"
        )
    if place.suffix not in _FILES:
        raise ValueError(
            f"weights: {place} is no file of weights; expected one ending in {', '.join(_FILES)}"
        )
    return place


# npz is big_vision's, whose trunks come with a whole model.
_FILES = tuple(ending for ending in places.FILES if ending != ".npz")


def stated_beside(file: Path) -> dict[str, Any]:
    """timm's own statement about a file of weights, from config.json beside it; {} for none."""
    config = file.parent / "config.json"
    stated = read_json(config).get("pretrained_cfg") if config.is_file() else None
    return stated if isinstance(stated, dict) else {}


def load_into(trunk: nn.Module, model: str, file: Path) -> None:
    """Read a file of weights into timm's `model`, without the classifier that it may hold.

    ValueError says what the file holds where that is something else.
    """
    from vlp.pretrained import fitting, weight_files

    expected = trunk.state_dict()
    weights = weight_files.read(file)
    if any(name.startswith(("visual.", "text.", "vision_model.")) for name in weights):
        raise ValueError(
            f"image_tower.weights: {file} holds a whole image-text model ({_some(weights)}); "
            "expected the weights of its image trunk alone. Name the file in model.pretrained"
        )

    weights = _under_timms_names(weights, trunk, model, file)
    heads = (*_classifier(trunk), *_stated_classifier(trunk))
    body = {name: value for name, value in weights.items() if not name.startswith(heads)}
    missing_counts = {
        name: value
        for name, value in expected.items()
        if name.endswith("num_batches_tracked") and name not in body
    }
    # Before torch 0.4.1 batch norms did not count, and a count changes nothing here.
    body |= missing_counts

    of_trunk = {k: value for k, value in expected.items() if not k.startswith(_classifier(trunk))}
    problem = fitting.misfit(of_trunk, body)
    if problem:
        raise ValueError(
            f"image_tower.weights: {file} does not fit timm's {model}: {problem}. It holds "
            f"{len(weights)} tensors ({_some(weights)}); expected {_some(of_trunk)}. Name the "
            "model that these weights belong to in image_tower.model"
        )
    trunk.load_state_dict(body, strict=False)


def _under_timms_names(
    weights: dict[str, Tensor], trunk: nn.Module, model: str, file: Path
) -> dict[str, Tensor]:
    """The tensors as timm would name and shape them, as far as their layout is known."""
    import timm

    expected = trunk.state_dict()
    if efficientnet_layout.is_theirs(weights):
        name = model.partition(".")[0]
        if not name.startswith("tf_") and timm.is_model(f"tf_{name}"):
            raise ValueError(
                f"image_tower.weights: {file} is of EfficientNet-PyTorch, whose weights were made "
                f"with TensorFlow's padding, and timm's {name} pads otherwise; write "
                f"model: tf_{name}"
            )
        return efficientnet_layout.renamed(weights, expected)

    fits = all(
        name in weights and weights[name].shape == value.shape
        for name, value in expected.items()
        if not name.startswith(_classifier(trunk))
    )
    # timm brings most models' published files under its names, and positions to another size.
    convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if fits or convert is None:
        return weights
    try:
        return dict(convert(dict(weights), trunk))
    # Of files that are far from fitting it raises whatever its indexing meets.
    except Exception:
        return weights


def _classifier(trunk: Any) -> tuple[str, ...]:
    """First parts of the names of the trunk's classifier, which here is new or absent."""
    classifier = trunk.get_classifier()
    classifiers = classifier if isinstance(classifier, tuple) else (classifier,)
    return tuple(
        f"{name}."
        for name, module in trunk.named_modules()
        if name and any(module is classifier for classifier in classifiers)
    )


def _stated_classifier(trunk: Any) -> tuple[str, ...]:
    """The same by timm's statement: a trunk without a classifier has none to ask."""
    stated = (getattr(trunk, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (stated,) if isinstance(stated, str) else tuple(stated)
    return tuple(f"{name}." for name in names)


def _some(weights: Mapping[str, Tensor]) -> str:
    names = list(weights)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
