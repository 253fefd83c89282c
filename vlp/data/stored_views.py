"""Crops of a picture that a teacher embedded before training, and that the student sees again
(dataset reinforcement: MobileCLIP, Vasu et al. 2023, arXiv 2311.17049).

No pixels and no rectangles are stored: a crop is a pure function of the picture, its key, the
crop's number, a seed and the augmentation, which the files of embeddings name.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from vlp.config import Augment
from vlp.schema import parse
from vlp.seeds import derive
from vlp.types import Decoding, ImageSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class StoredViews:
    """Which crops of each picture are embedded."""

    n: int  # of each picture
    seed: int
    augment: Augment
    decoding: Decoding  # the teacher's: a picture that is not turned has other crops

    @classmethod
    def read(cls, text: str) -> StoredViews:
        """What `text` wrote; raises ValueError."""
        return parse(cls, json.loads(text))

    @property
    def text(self) -> str:
        """JSON from which `read` makes the same views."""
        return json.dumps(asdict(self))

    def pixels(self, image: bytes, key: str, view: int, spec: ImageSpec) -> Tensor:
        """One of the crops of an encoded picture at the size of `spec`, uint8 [3, H, W]; raises
        BadImage.
        """
        # Here, because reading which views there are must not wait for torch.
        from vlp.data import decode

        # Of any size the same part: the crop is drawn before it is resized.
        chance = random.Random(derive(self.seed, "stored view", key, view))
        as_teacher = replace(spec, decoding=self.decoding)
        return decode.train_transform(image, as_teacher, self.augment, chance)
