"""Answers of a language model to questions about captions, asked in batches and kept as they come
(`vlp.data_tools._run.kept`): by a hash of the model's weights, the prompt with its caption, and how
words are drawn.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vlp.data_tools._run.kept import Kept, read_kept
from vlp.data_tools._writer.generate import Drawing, Generator, Question
from vlp.data_tools._writer.model import LanguageModel
from vlp.seeds import derive

FOLDER = "_answers"  # in the output of a tool


class Answers:
    """What a model answers, from a file where it was asked before, else from the model itself.

    `path`: the file of one shard's answers (None: kept in memory only). `earlier`: answers of an
    earlier call by hash, taken over where model, prompt and drawing are the same.
    """

    def __init__(
        self,
        model: LanguageModel,
        drawing: Drawing,
        path: Path | None = None,
        earlier: dict[str, list[str]] | None = None,
    ) -> None:
        self.model = model
        self.drawing = drawing
        self.earlier = earlier or {}
        self.kept = Kept(path)

        # Neither the reference nor the batch changes what is asked, nor of whom.
        about = model.settings() | asdict(drawing)
        self._about = {name: about[name] for name in about if name not in ("model", "batch")}

    def ask(self, questions: list[Question]) -> list[list[str] | None]:
        """The answers to each question; None where the model has no positions for the prompt."""
        generator = _generator(self.model)
        hashes = [self._hash(question) for question in questions]
        new = {
            key: question
            for key, question in zip(hashes, questions)
            if key not in self.earlier and generator.fits(question)
        }

        def compute(batch: list[str]) -> list[list[str]]:
            seed = derive(self.drawing.seed, "answers", *batch)
            return generator.answers([new[key] for key in batch], self.drawing, seed)

        # By length, so that a batch has little padding; each question once.
        in_order = sorted(new, key=lambda key: (len(new[key].prompt), key))
        self.kept.complete(in_order, self.model.batch, compute)
        return [self.earlier.get(key) or self.kept.values.get(key) for key in hashes]

    def _hash(self, question: Question) -> str:
        return digest([self._about, question.prompt, question.length])


def digest(value: list[Any]) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def read_earlier(folder: Path) -> dict[str, list[str]]:
    """All answers that an earlier call left in its output folder; raises ValueError for none."""
    paths = sorted((folder / FOLDER).glob("*.jsonl"))
    if not paths:
        raise ValueError(
            f"{folder} holds no answers of a language model ({FOLDER}/*.jsonl); "
            "name the output of `vlp data rewrite` or `vlp data negatives --rewriter`"
        )

    answers: dict[str, list[str]] = {}
    for path in paths:
        answers |= read_kept(path)
    return answers


@cache
def _generator(model: LanguageModel) -> Generator:
    return Generator(model.load())
