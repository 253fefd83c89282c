"""What happens to a sample: its captions are put to the model, and what stands the checks is
written.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlp.data_tools._english.words import bare
from vlp.data_tools._run.shards import Changed, windows
from vlp.data_tools._writer.answers import FOLDER, Answers, digest
from vlp.data_tools._writer.generate import Drawing, Question
from vlp.data_tools._writer.model import LanguageModel
from vlp.data_tools.negatives.fields import valid, with_negatives
from vlp.data_tools.negatives.rules import Negative, head
from vlp.data_tools.rewrite.prompts import Prompt

if TYPE_CHECKING:
    from vlp.data.members import Content

_WINDOW = 4  # batches of captions whose samples wait in memory, to be sorted by length

# Of each caption, for each prompt: what the model answered; empty where it could not.
OfCaptions = dict[str, list[list[str]]]


@dataclass(frozen=True)
class Rewrite:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    model: LanguageModel
    prompts: list[Prompt]
    drawing: Drawing
    first_only: bool = False  # only the first caption of a sample
    earlier: dict[str, list[str]] = field(default_factory=dict)  # answers of another call, by hash
    folder: Path | None = None  # of the output, where answers are kept

    def settings(self) -> dict[str, Any]:
        """What the output depends on, besides the input."""
        return {
            **self.model.settings(),
            "kinds": {prompt.kind: prompt.digest() for prompt in self.prompts},
            **asdict(self.drawing),
            "of": "first" if self.first_only else "all",
            "reused": digest(sorted(self.earlier)) if self.earlier else None,
        }

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        for sample, answers in self.answered(samples, shard, counts):
            meta = self._fields(sample, answers, counts)
            yield Changed(sample, list(sample.captions), meta)

    def answered(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[tuple[Content, OfCaptions]]:
        """Each sample with the answers to its captions."""
        path = self.folder and self.folder / FOLDER / f"{shard:05d}.jsonl"
        answers = Answers(self.model, self.drawing, path, self.earlier)
        for window in windows(samples, _WINDOW * self.model.batch):
            of_samples = [self._captions(sample) for sample in window]
            captions = list(dict.fromkeys(itertools.chain.from_iterable(of_samples)))
            of_captions = self._ask(answers, captions, counts)
            for sample, own_captions in zip(window, of_samples):
                yield sample, {caption: of_captions[caption] for caption in own_captions}

    def _captions(self, sample: Content) -> list[str]:
        """The captions that are rewritten, each once; of a long one the part that towers read."""
        captions = sample.captions[:1] if self.first_only else sample.captions
        return list(dict.fromkeys(head(caption) for caption in captions))

    def _ask(self, answers: Answers, captions: list[str], counts: Counter[str]) -> OfCaptions:
        """The answers to every prompt for each caption. Kind by kind: a kind's prompts are of one
        length.
        """
        of_captions: OfCaptions = {caption: [] for caption in captions}
        for prompt in self.prompts:
            questions: list[Question] = [prompt.question(caption) for caption in captions]
            for caption, texts in zip(captions, answers.ask(questions)):
                if texts is None:
                    counts[f"dropped: {prompt.kind}: the model has no place for the prompt"] += 1
                of_captions[caption].append(texts or [])
        counts["captions read"] += len(captions)
        return of_captions

    def _fields(self, sample: Content, answers: OfCaptions, counts: Counter[str]) -> dict[str, Any]:
        """The sample's JSON with what was written."""
        meta = dict(sample.meta)
        heads = [head(caption) for caption in sample.captions]
        candidates: list[tuple[Negative, int]] = []
        for place, prompt in enumerate(self.prompts):
            of_captions = {caption: of_kinds[place] for caption, of_kinds in answers.items()}
            if prompt.wrong:
                for caption, texts in of_captions.items():
                    number = heads.index(caption)
                    candidates += [(Negative(prompt.kind, text), number) for text in texts]
            else:
                self._write_true(meta, prompt.kind, heads, of_captions, counts)

        if any(prompt.wrong for prompt in self.prompts):
            candidates.sort(key=lambda candidate: candidate[1])
            meta = with_negatives(meta, valid(candidates, heads, counts), counts)

            # They are pictures of earlier negatives.
            sample.negative_images = {}
        return meta

    def _write_true(
        self,
        meta: dict[str, Any],
        kind: str,
        captions: list[str],
        of_captions: dict[str, list[str]],
        counts: Counter[str],
    ) -> None:
        """Put the captions of one kind into the JSON."""
        if kind in meta:
            counts[f"samples whose earlier {kind} was replaced"] += 1
            del meta[kind]

        # Compared as bare words: a capital or a full stop makes no other caption.
        true = {bare(caption) for caption in captions}
        kept: dict[str, str] = {}
        for text in itertools.chain.from_iterable(of_captions.values()):
            if not bare(text):
                counts[f"dropped: {kind}: empty"] += 1
            elif bare(text) in true:
                counts[f"dropped: {kind}: equal to a caption"] += 1
            elif bare(text) in kept:
                counts[f"dropped: {kind}: repeated"] += 1
            else:
                kept[bare(text)] = text

        counts[f"captions written: {kind}"] += len(kept)
        if kept:
            meta[kind] = list(kept.values())
        else:
            counts[f"samples without {kind}"] += 1
