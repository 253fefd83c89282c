"""How many objects of the most frequent class a detector of transformers, named by the user, sees
in a picture.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from vlp.data.picture import BadImage, rgb


def most_frequent(image: bytes, model: str, threshold: float) -> tuple[str, int] | None:
    """(class, number) of the class seen most often above `threshold`; ("", 0) where nothing is
    seen.

    None for a picture that does not open; ValueError for a model that cannot be loaded.
    """
    detect = _pipeline(model)
    try:
        picture = rgb(image)
    except BadImage:
        return None

    # Most captions count one kind of thing, and the most frequent is it most often.
    boxes = detect(picture, threshold=threshold)
    labels = Counter(box["label"] for box in boxes)
    if not labels:
        return "", 0
    label, n = labels.most_common(1)[0]
    return label, n


@cache
def _pipeline(model: str) -> Any:
    from transformers import pipeline

    try:
        return pipeline("object-detection", model=model)
    except OSError as error:
        raise ValueError(
            f"detector {model!r} is neither a folder nor a reachable model of the Hub: {error}"
        ) from None
