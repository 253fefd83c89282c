"""Answers of a language model, asked for in batches and kept in a file as they come.

FILE.jsonl has a line an answered prompt: {"hash": of the model's weights, the prompt with its
caption, and how words are drawn; "caption"; "answers": […], "" for an empty one}. A killed call
reads it and asks only for the batches that are missing.

A batch is made of the same prompts however often a call is stopped, because scores depend, in their
last bits, on what stands beside a prompt. So a call that goes on gives the same answers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from vlp.data_tools._writer.generate import Drawing, Generator, Question
from vlp.data_tools._writer.model import LanguageModel
from vlp.files import naming
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
        self.path = path
        self.earlier = earlier or {}
        self.written = read_answers(path) if path is not None and path.exists() else {}

        about = model.settings() | asdict(drawing)
        # The reference and the batch do not change what is asked, nor of whom.
        about = {name: about[name] for name in about if name not in ("model", "batch")}
        self._about = json.dumps(about, sort_keys=True)

    def ask(self, questions: list[Question]) -> list[list[str] | None]:
        """The answers to each question; None where the model has no positions for the prompt."""
        generator = _generator(self.model)
        hashes = [self._hash(question) for question in questions]

        # By length, so that a batch has little padding; each question once.
        new = {
            key: question
            for key, question in zip(hashes, questions)
            if key not in self.earlier and generator.fits(question)
        }
        in_order = sorted(new, key=lambda key: (len(new[key].prompt), key))
        for i in range(0, len(in_order), self.model.batch):
            batch = in_order[i : i + self.model.batch]
            if not all(key in self.written for key in batch):
                self._write(batch, [new[key] for key in batch], generator)

        return [self.earlier.get(key) or self.written.get(key) for key in hashes]

    def _write(self, batch: list[str], questions: list[Question], generator: Generator) -> None:
        seed = derive(self.drawing.seed, "answers", *batch)
        answers = generator.answers(questions, self.drawing, seed)
        self.written.update(zip(batch, answers))
        if self.path is None:
            return

        lines = [
            json.dumps({"hash": key, "caption": question.caption, "answers": texts})
            for key, question, texts in zip(batch, questions, answers)
        ]
        append(self.path, "".join(line + "\n" for line in lines))

    def _hash(self, question: Question) -> str:
        return digest([self._about, question.prompt, question.length])


def digest(value: list[Any]) -> str:
    """A hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def append(path: Path, text: str) -> None:
    """Add whole lines to a file, after what a killed call left of one, and wait for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "ab+") as file:
        # A half of a line must not swallow the next.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(text.encode(errors="surrogatepass"))
        file.flush()
        os.fsync(file.fileno())


def read_answers(path: Path) -> dict[str, list[str]]:
    """Hash → answers of a file; a line that a killed call left unfinished is passed over."""
    return {line["hash"]: line["answers"] for line in read_lines(path)}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that `append` wrote."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"hash", "answers"} <= line.keys():
                yield line


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
        answers |= read_answers(path)
    return answers


@cache
def _generator(model: LanguageModel) -> Generator:
    return Generator(model.load())
