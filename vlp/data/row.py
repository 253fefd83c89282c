"""One row of a step: the sample that stands in it, which of its captions, and its randomness."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain

from vlp.config import Captions
from vlp.data import wrong_captions
from vlp.data.modalities import Further
from vlp.data.sentences import first_sentence, sentences
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
    further: Further | None = None  # its further modalities, where a term reads them

    @property
    def query(self) -> str:
        """The text that stands in the picture's place; of pairs of texts."""
        return self.sample.image.decode()

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
    """The texts of a sample that training takes: its captions, or those that have a weight where
    weights are of positions, or its sentences.
    """
    captions = sample.captions
    if config.choose == "sentences":
        return tuple(chain.from_iterable(map(sentences, captions)))
    return captions[: len(config.weights)] if config.weights else captions


def captions_beside(row: Row, config: Captions) -> list[str | None]:
    """The captions of a row's sample that stand beside one another in it, in their order, at most
    `n_beside`; None for a role that the sample lacks.

    Of more than fit, others are drawn anew at each visit without replacement.
    """
    if config.roles:
        return [_of_role(row, config, role) for role in config.roles]
    if config.choose == "first_sentence":
        return [first_sentence(row.sample.captions[0])]

    offered = offered_captions(row.sample, config)
    places = list(range(len(offered)))
    if len(places) > config.n_beside:
        places = sorted(row.chance("captions").sample(places, config.n_beside))
    return [offered[place] for place in places]


def choose_caption(row: Row, config: Captions) -> str:
    """The caption that stands in the row as its text, where the mixture did not draw one."""
    captions, weights = row.sample.captions, row.sample.weights

    if config.choose == "first_sentence":
        return captions[0] if config.n_beside else first_sentence(captions[0])
    if config.n_beside:
        return _one_of(captions_beside(row, config), row, config)
    if config.choose == "first":
        return captions[0]

    # The source's shares of its text fields come before weights of positions.
    if weights:
        return row.chance("caption").choices(captions, weights)[0]
    offered = offered_captions(row.sample, config)
    if config.choose == "weights":
        return row.chance("caption").choices(offered, config.weights[: len(offered)])[0]

    return offered[row.draw("caption") % len(offered)]


def _one_of(beside: list[str | None], row: Row, config: Captions) -> str:
    """The text of a row whose captions stand beside one another: that of the first role, or one of
    them, drawn anew at each visit.
    """
    texts = [text for text in beside if text is not None]
    return texts[0 if config.roles else row.draw("caption") % len(texts)]


def _of_role(row: Row, config: Captions, role: str) -> str | None:
    """The sample's caption of a role; of several one, drawn anew at each visit."""
    captions = row.sample.captions
    roles = row.sample.roles or config.roles  # unnamed captions have their roles by their order
    texts = [caption for caption, own_role in zip(captions, roles) if own_role == role]
    if not texts:
        return None
    return texts[row.draw(f"caption of {role}") % len(texts)]
