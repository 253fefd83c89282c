"""Negatives by a language model of transformers that the user names: a masked one fills in other
words, a causal or an encoder-decoder one answers a prompt. Nothing vouches that they are false;
`vlp data negatives` drops only what captions show to be true.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vlp.data_tools._english.shuffles import FUNCTION_WORDS
from vlp.data_tools._english.words import Word, edit, words
from vlp.data_tools._writer.answers import FOLDER, Answers
from vlp.data_tools._writer.generate import Drawing, Question
from vlp.data_tools._writer.model import LanguageModel, Loaded
from vlp.data_tools.negatives.rules import Negative

Rewrite = Callable[[list[str]], dict[str, list[Negative]]]  # the negatives of each caption
N_WORDS = 2  # words of a caption that a masked model is asked for
N_LIKELY = 20  # its most likely words to choose from; beyond them sentences fall apart


@dataclass(frozen=True)
class Rewriter:
    """A language model that makes negatives of captions, many at once."""

    model: LanguageModel
    prompt: str  # with {} for the caption; a masked model needs none
    folder: Path | None = None  # of the output, where answers are kept

    def settings(self) -> dict[str, Any]:
        """What its negatives depend on."""
        return self.model.settings() | {"prompt": self.prompt}

    def of_shard(self, shard: int, seed: int) -> Rewrite:
        """What gives the negatives of captions of one shard."""
        loaded = self.model.load()
        if loaded.kind == "masked":
            return partial(fill_in, loaded=loaded, seed=seed, batch=self.model.batch)

        path = self.folder and self.folder / FOLDER / f"{shard:05d}.jsonl"
        return partial(self._answered, answers=Answers(self.model, Drawing(), path))

    def _answered(self, captions: list[str], answers: Answers) -> dict[str, list[Negative]]:
        """The answers to the prompt; an empty one where the model has no positions for it."""
        questions = [Question(self.prompt.replace("{}", text), text) for text in captions]
        return {
            caption: [Negative("rewritten", text) for text in texts or [""]]
            for caption, texts in zip(captions, answers.ask(questions))
        }


def fill_in(
    captions: list[str], loaded: Loaded, seed: int, batch: int
) -> dict[str, list[Negative]]:
    """Captions with content words replaced by others that a masked language model finds likely."""
    places: list[tuple[str, Word]] = []
    for caption in captions:
        # By the caption, so that no order of captions changes a choice.
        rng = random.Random(f"{seed}/{caption}")
        content = [w for w in words(caption) if w.text not in FUNCTION_WORDS and w.text.isalpha()]
        places += [(caption, word) for word in rng.sample(content, min(N_WORDS, len(content)))]

    negatives: dict[str, list[Negative]] = {caption: [] for caption in captions}
    mark = _mark_of_beginnings(loaded.tokenizer)
    for i in range(0, len(places), batch):
        likely = _likely_words(loaded, places[i : i + batch])
        for (caption, word), tokens in zip(places[i : i + batch], likely):
            # One at random of the likely words: the likeliest is most often the true one.
            candidates = [_word(loaded.tokenizer, mark, token, caption) for token in tokens]
            candidates = [text for text in candidates if text]
            if candidates:
                new = random.Random(f"{seed}/{caption}/{word.start}").choice(candidates)
                text = edit(caption, [(word.start, word.end, new)])
                negatives[caption].append(Negative("masked", text, frozenset({new})))
    return negatives


def _likely_words(loaded: Loaded, places: list[tuple[str, Word]]) -> list[list[int]]:
    """The likeliest tokens for the masked word of each caption; none where it was cut off with the
    end of a long caption.
    """
    import torch

    tokenizer = loaded.tokenizer
    masked = [
        caption[: word.start] + tokenizer.mask_token + caption[word.end :]
        for caption, word in places
    ]
    inputs = tokenizer(masked, return_tensors="pt", truncation=True, padding=True)
    inputs = inputs.to(loaded.device)
    with torch.inference_mode():
        logits = loaded.model(**inputs).logits

    is_mask = inputs.input_ids == tokenizer.mask_token_id
    at_mask = logits[torch.arange(len(places)), is_mask.int().argmax(1)]
    likely = at_mask.topk(min(N_LIKELY, at_mask.shape[1])).indices.tolist()
    is_there = is_mask.any(1).tolist()
    return [tokens if there else [] for tokens, there in zip(likely, is_there)]


def _mark_of_beginnings(tokenizer: Any) -> str:
    """How a vocabulary marks a word's beginning; "" where it marks continuations instead."""
    vocabulary = tokenizer.get_vocab()
    for mark in ("Ġ", "▁"):
        if any(token.startswith(mark) for token in vocabulary):
            return mark
    return ""


def _word(tokenizer: Any, mark: str, token: int, caption: str) -> str:
    """A token as a whole word that the caption does not hold yet, else ""."""
    text = str(tokenizer.decode([token])).strip().lower()
    piece = str(tokenizer.convert_ids_to_tokens(token))
    is_whole = text.isalpha() and piece.startswith(mark) and not piece.startswith("##")

    # Not a word that is there already: it would say nothing new, or the same twice.
    in_caption = text in {word.text for word in words(caption)}
    is_special = token in tokenizer.all_special_ids
    if not is_whole or in_caption or is_special or text in FUNCTION_WORDS:
        return ""
    return text
