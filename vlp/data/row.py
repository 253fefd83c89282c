"""One row of a step: the sample that stands in it, which of its captions, and its randomness."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vlp.config import Captions
from vlp.data import wrong_captions
from vlp.data.wrong_captions import WrongCaptions
from vlp.seeds import derive
from vlp.types import Sample


@dataclass(frozen=True)
class Row:
    """A row of a step's global batch."""

    sample: Sample
    seed: int  # of the run
    step: int
    number: int  # 0 ≤ number < B
    caption: str = ""  # of the sample's; chosen after the sample is known to be usable

    def draw(self, purpose: str, *position: int) -> int:
        """A seed for one purpose, the same whenever this step is made again."""
        # By the sample as well: a stand-in must not repeat what the bad sample would have drawn.
        sample_id = self.sample.sample_id
        return derive(self.seed, purpose, self.step, self.number, sample_id, *position)

    def chance(self, purpose: str, *position: int) -> random.Random:
        """Randomness for one purpose, from `draw`."""
        return random.Random(self.draw(purpose, *position))

    def wrong(self, name: str) -> tuple[WrongCaptions, list[int]]:
        """The sample's `negatives` or `counterfactuals`, and the places of those that belong to the
        row's caption.
        """
        sample = self.sample
        wrong = wrong_captions.read(sample.meta, name, sample.captions)
        return wrong, wrong.of(self.caption)

    def negative_images(self, width: int) -> list[bytes]:
        """The images of the row's first `width` negatives, b"" where one has none; those of another
        caption's negatives are none of this row's.
        """
        _, places = self.wrong("negatives")
        images = [self.sample.negative_images.get(place, b"") for place in places[:width]]
        return images + [b""] * (width - len(images))


def offered_captions(sample: Sample, config: Captions) -> tuple[str, ...]:
    """The captions of a sample that training takes: those that have a weight, where weights are
    of positions.
    """
    return sample.captions[: len(config.weights)] if config.weights else sample.captions


def choose_caption(row: Row, config: Captions) -> str:
    """The caption that stands in the row, where the mixture did not draw one."""
    captions, weights = row.sample.captions, row.sample.weights

    if config.choose == "first" or len(captions) == 1:
        return captions[0]

    # The source's shares of its text fields come before weights of positions.
    if weights:
        return row.chance("caption").choices(captions, weights)[0]
    if config.choose == "weights":
        offered = offered_captions(row.sample, config)
        return row.chance("caption").choices(offered, config.weights[: len(offered)])[0]

    return captions[row.draw("caption") % len(captions)]
