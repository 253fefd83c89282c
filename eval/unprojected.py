"""The features of an image tower before its projection into the shared space, as probes of the
literature use them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError


def unprojected(encoder: Encoder) -> Encoder:
    """The encoder whose pictures become unit rows of what its projection would read.

    Raises DataError where the tower's projection is not known: a CLIP ResNet's is part of its
    attention pool.
    """
    if encoder.width is not None:
        raise DataError(
            "features=unprojected are those before the projection, and --width is of those after "
            "it; leave out one of the two"
        )
    module, name = _projection(encoder)
    # Nonnegative embeddings are a step after the projection.
    features = encoder.features or encoder.image

    def image(pixels: Tensor) -> Tensor:
        with _without(module, name):
            return features(pixels)

    # Kept apart from the projected embeddings on disk.
    fingerprint = encoder.fingerprint and f"{encoder.fingerprint} unprojected"
    return replace(encoder, image=image, fingerprint=fingerprint)


def _projection(encoder: Encoder) -> tuple[nn.Module, str]:
    """The module that holds the projection, and under which name."""
    tower = encoder.tower

    # open_clip's ViT multiplies by a parameter; timm's and transformers' towers end in a module.
    names = ("proj", "head", "visual_projection")
    name = next((name for name in names if hasattr(tower, name)), None)
    if tower is None or name is None:
        kind = "several towers" if tower is None else type(tower).__name__
        raise DataError(
            f"{encoder.name} has {kind}, whose features before the projection are not known; "
            "leave out features=unprojected"
        )
    return tower, name


@contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """The module without its projection, which comes back whatever happens."""
    projection = getattr(module, name)
    setattr(module, name, nn.Identity() if isinstance(projection, nn.Module) else None)
    try:
        yield
    finally:
        setattr(module, name, projection)
