"""What becomes of a shard's samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlp.data_tools.filter.conditions import refuse
from vlp.data_tools.filter.repeats import hash_of
from vlp.data_tools.filter.rules import Rules
from vlp.data_tools.filter.scores import CLIP_SCORES, with_cosines

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model
    from vlp.data_tools._run.shards import Changed
    from vlp.data_tools.filter.alike import Chosen
    from vlp.data_tools.filter.scores import Shares, Stored
    from vlp.data_tools.filter.spotting import Spotter

N_READ = 8  # pictures whose text is read at once, decoded in memory


@dataclass(frozen=True)
class Filter:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    rules: Rules
    model: Model | None = None
    # sorted hashes of captions that too many samples have
    repeated: np.ndarray | None = field(default=None, repr=False)
    stored: Stored | None = None
    shares: Shares | None = None
    chosen: Chosen | None = None
    spotter: Spotter | None = None

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        # Scores first, because rules may ask for them; the dear ones last.
        scored = self.stored.put(samples, shard, counts) if self.stored else samples
        kept = self._compared(scored, shard, counts)
        # Lazily: a shard's samples are held one at a time, or as many as a batch.
        kept = (sample for sample in kept if self._passes(sample, counts))
        if self.spotter:
            kept = self._spotted(self.spotter, kept, counts)
        if self.model:
            kept = self._near(self.model, kept, counts)
        for sample in kept:
            yield Changed(sample, list(sample.captions), sample.meta)

    def _compared(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Content]:
        """The samples that are among the highest of every share, and in a cell that is wanted."""
        # All samples of the shard, because they are told by their places.
        reasons = self.shares.put(samples, shard) if self.shares else ((one, "") for one in samples)
        inside = self.chosen.inside(shard) if self.chosen else None
        for place, (sample, reason) in enumerate(reasons):
            if not reason and inside is not None and not inside[place]:
                reason = "--like: in no cell of its pictures"
            if reason:
                counts[f"dropped: {reason}"] += 1
            else:
                yield sample

    def _passes(self, sample: Content, counts: Counter[str]) -> bool:
        """Whether a sample stays before what is dear; its captions become those that do."""
        reason = self.rules.refuse_sample(sample)
        reason = reason or refuse(sample.meta, self.rules.keep, self.rules.drop, counts)
        if reason:
            counts[f"dropped: {reason}"] += 1
            return False
        if not self.rules.about_captions():
            return True

        # A caption's own reason before the one that needs the other samples.
        reasons = [
            self.rules.refuse_caption(caption) or self._too_common(caption)
            for caption in sample.captions
        ]
        self._count_unclear(sample.captions, reasons, counts)
        return _keep(sample, reasons, counts)

    def _count_unclear(
        self, captions: tuple[str, ...], reasons: list[str], counts: Counter[str]
    ) -> None:
        """Say how many captions stay although their language may be none that is wanted."""
        if not self.rules.languages:
            return
        kept = [caption for caption, reason in zip(captions, reasons) if not reason]
        unclear = [caption for caption in kept if self.rules.is_wanted(caption) is None]
        if unclear:  # else the report would show a line of 0
            name = "captions kept: language unclear (--unclear drop refuses them)"
            counts[name] += len(unclear)

    def _too_common(self, caption: str) -> str:
        import numpy as np

        # Most often there is nothing to look up.
        if self.repeated is None or not len(self.repeated):
            return ""
        hashed = hash_of(caption)
        place = np.searchsorted(self.repeated, hashed)
        is_repeated = place < len(self.repeated) and self.repeated[place] == hashed
        return f"in more than {self.rules.max_repeats} samples" if is_repeated else ""

    def _spotted(
        self, spotter: Spotter, samples: Iterable[Content], counts: Counter[str]
    ) -> Iterator[Content]:
        """The samples, without the captions that repeat the text in the picture."""
        from vlp.data_tools._run.shards import windows

        for window in windows(samples, N_READ):
            for sample, of_picture in _with_texts(spotter, window, counts):
                if of_picture:
                    counts["pictures with text in them"] += 1
                if spotter.field:
                    sample.meta[spotter.field] = of_picture
                reasons = [spotter.refuse(caption, of_picture) for caption in sample.captions]
                if spotter.max_overlap is None or _keep(sample, reasons, counts):
                    yield sample

    def _near(
        self, model: Model, samples: Iterable[Content], counts: Counter[str]
    ) -> Iterator[Content]:
        """The samples, with the captions that the model finds near enough."""
        # Where a share is of the cosines, the survey computed them.
        surveyed = self.shares is not None and self.shares.with_cosines
        for sample in samples if surveyed else with_cosines(model, samples, counts):
            cosines = sample.meta.get(CLIP_SCORES)
            if cosines is None:
                counts["dropped: no readable picture"] += 1
                continue

            # In steps of .05, so that the report shows where a threshold would cut.
            counts.update(
                f"captions with a score from {cosine // 0.05 * 0.05:+.2f}" for cosine in cosines
            )
            if _keep(sample, [self._too_unlike(cosine) for cosine in cosines], counts):
                yield sample

    def _too_unlike(self, cosine: float) -> str:
        least = self.rules.min_score
        return f"score below {least:g}" if least is not None and cosine < least else ""


def _with_texts(
    spotter: Spotter, samples: list[Content], counts: Counter[str]
) -> Iterator[tuple[Content, list[str]]]:
    """The samples that stay, with the texts in their pictures."""
    if spotter.kept_in:
        for sample in samples:
            kept = spotter.kept(sample.meta)
            if kept is None:
                counts[f"kept: no texts in {spotter.kept_in}"] += 1
            yield sample, kept or []
        return

    pictures = [_open(sample, counts) for sample in samples]
    opened = [sample for sample, picture in zip(samples, pictures) if picture is not None]
    texts = spotter.texts([picture for picture in pictures if picture is not None])
    for sample, of_picture in zip(opened, texts):
        if of_picture is None:
            counts["kept: the text in the picture could not be read"] += 1
        yield sample, of_picture or []


def _open(sample: Content, counts: Counter[str]) -> Image | None:
    """A sample's picture; None, counted, where it does not open."""
    from vlp.data.picture import BadImage, rgb

    try:
        return rgb(sample.image)
    except BadImage:
        counts["dropped: no readable picture"] += 1
        return None


def _keep(sample: Content, reasons: list[str], counts: Counter[str]) -> bool:
    """Leave the captions without a reason to drop them; whether there is one."""
    from vlp.data_tools._belonging import keep_captions

    # What belongs to a caption that goes, such as its negatives, goes with it.
    counts.update(f"captions dropped: {reason}" for reason in reasons if reason)
    keep_captions(sample, [i for i, reason in enumerate(reasons) if not reason], counts)
    if not sample.captions:
        counts["dropped: no caption left" if reasons else "dropped: no caption"] += 1
    return bool(sample.captions)
