"""Frames of a video among a sample's members: which of them a batch carries, and their pixels."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from vlp.data.further_members import Files
from vlp.data.picture import BadImage


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


def draw(
    files: Files,
    places: Sequence[int],
    crop: Callable[[bytes], Tensor],
    out: Tensor,  # [F, 3, H, W], zeros behind the last frame afterwards
) -> None:
    """Write the frames at these places of a video; ValueError for one that does not open."""
    out[len(places) :].zero_()
    for row, place in zip(out, places):
        try:
            row.copy_(crop(files.read(place)))
        except BadImage as error:
            raise ValueError(f"frame {place} of the video: {error}") from error
