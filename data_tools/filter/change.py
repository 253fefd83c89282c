"""What becomes of a shard's samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from vlp.data_tools.filter.conditions import refuse
from vlp.data_tools.filter.repeats import hash_of
from vlp.data_tools.filter.rules import Rules

if TYPE_CHECKING:
    import numpy as np

    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model
    from vlp.data_tools._run.shards import Changed


@dataclass(frozen=True)
class Filter:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    rules: Rules
    model: Model | None = None
    # sorted hashes of captions that too many samples have
    repeated: np.ndarray | None = field(default=None, repr=False)

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        # Lazily: a shard's samples are held one at a time, or as many as a batch.
        passed = (sample for sample in samples if self._passes(sample, counts))
        if self.model:
            yield from self._scored(self.model, passed, counts)
            return
        for sample in passed:
            yield Changed(sample, list(sample.captions), sample.meta)

    def _passes(self, sample: Content, counts: Counter[str]) -> bool:
        """Whether a sample stays before its score; its captions become those that do."""
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
        from vlp.data_tools._english.traits import is_in

        if not self.rules.languages:
            return
        kept = [caption for caption, reason in zip(captions, reasons) if not reason]
        unclear = [caption for caption in kept if is_in(caption, self.rules.languages) is None]
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

    def _scored(
        self, model: Model, samples: Iterable[Content], counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        for batch, images in model.batches(samples, counts):
            # All captions of a batch in one pass, whoever has them.
            captions = list(chain.from_iterable(sample.captions for sample in batch))
            texts = model.encoder().encode_texts(captions).cpu()
            rows_of_samples = texts.split([len(sample.captions) for sample in batch])

            for sample, image, rows in zip(batch, images, rows_of_samples):
                if not image.any():
                    counts["dropped: no readable picture"] += 1
                    continue
                scores = [round(score, 4) for score in (rows @ image).tolist()]

                # In steps of .05, so that the report shows where a threshold would cut.
                counts.update(
                    f"captions with a score from {score // 0.05 * 0.05:+.2f}" for score in scores
                )

                reasons = [self._too_unlike(score) for score in scores]
                if _keep(sample, reasons, counts):
                    kept = [score for score, reason in zip(scores, reasons) if not reason]
                    meta = {**sample.meta, "clip_scores": kept}
                    yield Changed(sample, list(sample.captions), meta)

    def _too_unlike(self, score: float) -> str:
        assert self.rules.min_score is not None  # it goes together with the model
        return f"score below {self.rules.min_score:g}" if score < self.rules.min_score else ""


def _keep(sample: Content, reasons: list[str], counts: Counter[str]) -> bool:
    """Leave the captions without a reason to drop them; whether there is one."""
    from vlp.data_tools._belonging import keep_captions

    # What belongs to a caption that goes, such as its negatives, goes with it.
    counts.update(f"captions dropped: {reason}" for reason in reasons if reason)
    keep_captions(sample, [i for i, reason in enumerate(reasons) if not reason], counts)
    if not sample.captions:
        counts["dropped: no caption left" if reasons else "dropped: no caption"] += 1
    return bool(sample.captions)
