"""Captions to token ids [n, L] for a language model: each inside a prompt, and cut to fit there.

An id says what its place is, so that nothing travels beside the ids:

    id ≥ 0      a token
    −1          PADDING, always at the end; the tower masks it, so that a tokenizer needs none
    −2 − id     a token of the prompt, where the tower's pooling leaves the prompt out (`mark`)

Rules. Begin and end tokens are those that the tokenizer itself adds; with `end` its end token
closes every text that does not end with it already. A text that is too long loses words of the
caption, at its end, never of the prompt. A caption is data: unless the prompt has special tokens
itself, one that is written in a caption is spelled out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp.pretrained import places
from vlp.pretrained.tokenizers import tokenizer
from vlp.types import TextSpec

PADDING = -1
_MARKED = -2  # less the id


def is_prompted(spec: TextSpec) -> bool:
    """Whether a specification is of this tokenizer."""
    return "prompt" in spec.options


def unmarked(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens [n, L] of such ids, 0 where there is none; which places hold one, and which hold
    one that is not of a marked prompt (bool, [n, L]).
    """
    is_token, is_marked = ids != PADDING, ids <= _MARKED
    tokens = torch.where(is_marked, _MARKED - ids, ids).masked_fill(~is_token, 0)
    return tokens, is_token, is_token & ~is_marked


class PromptedTokenizer:
    """A Hugging Face tokenizer by name or folder, whose texts stand in a prompt. `vocab_size`
    counts the special tokens too.

    spec.options: `prompt` with one {}, `end`, `mark`. ValueError where the prompt leaves no room.
    """

    def __init__(self, spec: TextSpec) -> None:
        from vlp.data._clip_text import tokenizers as theirs

        self.context_length = spec.context_length
        self._clean = theirs.get_clean_fn(spec.clean)
        self._before, _, self._after = spec.options["prompt"].partition("{}")
        self._mark: bool = spec.options.get("mark", False)

        place = places.locate(spec.tokenizer)
        self._inner: Any = tokenizer(place, spec.tokenizer)
        self.vocab_size = len(self._inner)
        if not getattr(self._inner, "is_fast", False):
            raise ValueError(
                f"the tokenizer {spec.tokenizer} cannot say which words its tokens come from; "
                "it needs a tokenizer.json"
            )
        self._end: int | None = self._inner.eos_token_id if spec.options.get("end") else None
        if spec.options.get("end") and self._end is None:
            raise ValueError(
                f"pool: eos reads the end token, and the tokenizer {spec.tokenizer} has none; "
                "choose pool: last"
            )

        special = self._inner.all_special_tokens
        self._spelled_out = not any(token in spec.options["prompt"] for token in special)
        n_prompt = len(self._encode([""])[0].ids)
        if n_prompt >= self.context_length:
            raise ValueError(
                f"the prompt alone takes {n_prompt} tokens of context_length "
                f"{self.context_length}; raise context_length, or shorten the prompt"
            )

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids, int64 [n, L], as the module says."""
        return self.tokenize(texts)[0]

    def tokenize(self, texts: list[str]) -> tuple[Tensor, int]:
        """Token ids, int64 [n, L], and how many texts were truncated."""
        result = np.full((len(texts), self.context_length), PADDING, np.int64)
        n_truncated = 0
        for row, whole in zip(result, self._encode(texts)):
            fitting = whole.cut(self.context_length)
            n_truncated += fitting is not whole
            ids = fitting.marked() if self._mark else fitting.ids
            row[: len(ids)] = ids
        return torch.from_numpy(result), n_truncated

    def _encode(self, texts: list[str]) -> list[_Encoded]:
        """The tokens of texts in the prompt, whole."""
        cleaned = [self._clean(text) for text in texts]
        prompted = [f"{self._before}{text}{self._after}" for text in cleaned]
        if not prompted:
            return []
        output = self._inner(
            prompted,
            return_offsets_mapping=True,
            split_special_tokens=self._spelled_out,
            verbose=False,
        )

        # Which characters a token covers tells which of them are the caption's.
        first = len(self._before)
        encoded = []
        for ids, spans, text in zip(output["input_ids"], output["offset_mapping"], cleaned):
            offsets = np.array(spans, np.int64).reshape(-1, 2)
            encoded.append(self._closed(ids, offsets, first, first + len(text)))
        return encoded

    def _closed(self, ids: list[int], spans: np.ndarray, first: int, last: int) -> _Encoded:
        """One text's tokens, with an end token where one is asked for."""
        starts, ends = spans[:, 0], spans[:, 1]
        has_words = ends > starts
        touches = has_words & (starts < last) & (ends > first)
        within = has_words & (starts >= first) & (ends <= last)

        # A text of nothing would have no place to be read at.
        is_closed = bool(ids) and ids[-1] == self._end
        if (self._end is not None and not is_closed) or not ids:
            ids = [*ids, self._inner.eos_token_id or 0]
            touches, within = np.append(touches, False), np.append(within, False)
        return _Encoded(np.array(ids, np.int64), touches, within)


class _Encoded(NamedTuple):
    """The tokens of one text, [n]; which hold any of the caption, and which nothing else."""

    ids: np.ndarray
    touches: np.ndarray
    within: np.ndarray

    def cut(self, length: int) -> _Encoded:
        """At most `length` tokens: without the last ones of the caption."""
        n_over = len(self.ids) - length
        if n_over <= 0:
            return self
        dropped = np.flatnonzero(self.within)[-n_over:]
        kept = np.delete(np.arange(len(self.ids)), dropped)[:length]
        return _Encoded(self.ids[kept], self.touches[kept], self.within[kept])

    def marked(self) -> np.ndarray:
        """The ids, those of the prompt marked; a text without a caption has no others to read."""
        if not self.touches.any():
            return self.ids
        return np.where(self.touches, self.ids, _MARKED - self.ids)
