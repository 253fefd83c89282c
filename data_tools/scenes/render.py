"""One scene: its picture, its captions and its JSON."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image

PROOFS = ("counting", "binding", "relations", "order")


class Scene(NamedTuple):
    """A rendered sample: `meta` is its JSON (with the exact scene under "scene")."""

    image: Image
    meta: dict[str, Any]
    captions: list[str]


def generate(index: int, seed: int = 0, split: str = "train", size: int = 64) -> Scene:
    """Scene `index` of a split, always the same for the same arguments; raises ValueError for an
    unknown split.
    """
    from vlp.data_tools.scenes.captions import captions, with_negatives
    from vlp.data_tools.scenes.draw import draw
    from vlp.data_tools.scenes.sample import SPLITS, sample
    from vlp.data_tools.scenes.words import heldout

    if split not in SPLITS:
        raise ValueError(f"no split {split!r} of scenes; known: {', '.join(SPLITS)}")

    # Two random states: another wording must not move an object.
    scene = sample(index, seed, split)
    rng = random.Random(f"captions {seed}/{split}/{index}")
    meta: dict[str, Any] = {
        "scene": scene,
        "seed": seed,
        "split": split,
        "index": index,
        "heldout": heldout(scene["groups"]),
    }
    if split not in PROOFS:
        texts = captions(scene, rng, full=split == "retrieval")
        return Scene(draw(scene, size), meta, texts)

    caption, negatives = with_negatives(scene, split, rng)
    meta |= {
        "caption": caption,
        "kind": split,
        "negatives": [text for text, _ in negatives],
        "negative_kinds": [kind for _, kind in negatives],
        "negatives_valid": [True] * len(negatives),
    }
    return Scene(draw(scene, size), meta, [caption])
