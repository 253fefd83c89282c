"""Frames of a video among a sample's members: which of them a batch carries, and their pixels."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from vlp.config import Augment
from vlp.data import decode
from vlp.data.picture import BadImage
from vlp.types import ImageSpec

if TYPE_CHECKING:
    from vlp.data.row import Row


def chosen(n_frames: int, most: int, chance: random.Random | None) -> list[int]:
    """At most so many of a video's frames: one of each of so many equal parts, where `chance` lets
    it lie; None: the middle one.
    """
    if n_frames <= most:
        return list(range(n_frames))
    ends = [part * n_frames // most for part in range(most + 1)]
    if chance is None:
        return [(first + end - 1) // 2 for first, end in pairwise(ends)]
    return [chance.randrange(first, end) for first, end in pairwise(ends)]


def draw(row: Row, name: str, spec: ImageSpec, augment: Augment, out: Tensor) -> None:
    """Write the frames of the row's video `name`, all cropped alike, and zeros behind the last one
    to `out` [F, 3, H, W]; ValueError for one that does not open.
    """
    assert row.further is not None, "frames are carried only beside modalities"
    places = row.further.frames
    out[len(places) :].zero_()
    for pixels, place in zip(out, places):
        # By one seed for all: a crop that jumps from frame to frame would be a movement.
        chance = row.chance(f"pixels of {name}")
        data = row.sample.members[name].read(place)
        try:
            pixels.copy_(decode.train_transform(data, spec, augment, chance))
        except BadImage as error:
            raise ValueError(f"frame {place} of the video: {error}") from error
