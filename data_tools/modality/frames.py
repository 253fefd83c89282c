"""Videos as embeddings of their frames by an image tower, evenly chosen over the video."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp.data.further_members import Member, frames_of

if TYPE_CHECKING:
    import numpy as np

    from vlp.data_tools._encoder import Model


class Frame(NamedTuple):
    """An encoded picture, as a model's batches take it."""

    image: bytes


@dataclass(frozen=True)
class Frames:
    """Up to n frames of a sample: its pictures KEY.NUMBER.jpg."""

    model: Model
    n: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.model.width()

    def settings(self) -> dict[str, Any]:
        return {"kind": "frames", "n": self.n, **self.model.settings()}

    def members(self, of_sample: list[Member]) -> list[Member]:
        in_order = frames_of(of_sample)
        n_frames = min(self.n, len(in_order))
        return [in_order[place * len(in_order) // n_frames] for place in range(n_frames)]

    def rows(self, files: list[bytes]) -> np.ndarray:
        import numpy as np

        counts: Counter[str] = Counter()
        batches = self.model.batches([Frame(data) for data in files], counts)
        rows = np.concatenate([rows.numpy() for _, rows in batches])
        # A frame that does not open would be a row of zeros in the middle of a video.
        kept = rows[rows.any(1)]
        if not len(kept):
            raise ValueError("a video none of whose frames opens")
        return kept
