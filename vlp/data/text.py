"""Captions to token ids [n, L], as the text tower's `TextSpec` says.

"clip" gives exactly the ids of open_clip's SimpleTokenizer, several times faster: captions of plain
ASCII need no repair, and a word's ids are looked up. One thing is different on purpose: a caption
is data, so a literal `<start_of_text>` or `<end_of_text>` in it is spelled out like any other text;
open_clip would end the caption there, because its towers read the features at the first end token.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import regex
import torch
from torch import Tensor

from vlp.data.prompted import PromptedTokenizer, is_prompted
from vlp.pretrained import places
from vlp.pretrained.tokenizers import checked
from vlp.types import TextSpec

# Threads of the tokenizers library do not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_PROBES = ["A photo of 2 red Circles, naïve & café!", "two dogs"]
# Words kept; without a bound the cache of a multilingual run grows for ever.
_LIMIT = 1 << 17
# SimpleTokenizer's pattern, special tokens left out
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build(spec: TextSpec) -> ClipTokenizer | HubTokenizer | PromptedTokenizer:
    """The tokenizer for `spec`: callable on a list of texts, returning int64 [n, L]; raises
    ValueError or OSError.
    """
    if spec.options.get("reduction_mask"):
        raise ValueError(
            "reduction_mask draws tokens at random outside our seeds; choose plain truncation"
        )
    if is_prompted(spec):
        return PromptedTokenizer(spec)
    return ClipTokenizer(spec) if spec.tokenizer == "clip" else HubTokenizer(spec)


class Frame(NamedTuple):
    """The ids around a caption's words, as a tokenizer sets them: begin, words, end, padding."""

    begin: int
    end: int
    padding: int
    n_ids: int  # that the tokenizer knows, from 0 on; a text tower may have more


def frame(spec: TextSpec) -> Frame:
    """The ids between which a text decoder writes; ValueError for a tokenizer that has no token to
    begin with, none to end with, or pads with one of them.
    """
    if spec.tokenizer == "clip" and not is_prompted(spec):
        return Frame(_CLIP_BEGIN, _CLIP_END, 0, _CLIP_END + 1)

    tokenizer = build(spec)
    (row,) = tokenizer([""]).tolist()
    padding = row[-1]
    around = [token for token in row if token != padding]
    if len(around) != 2 or around[0] == around[1]:
        raise ValueError(
            f"the tokenizer {spec.tokenizer} frames an empty caption as {row[:4]}…; a text decoder "
            "needs one token to begin with, another one to end with, and padding that is neither: "
            "set bos_token, eos_token and pad_token in its tokenizer_config.json"
        )
    begin, end = around
    return Frame(begin, end, padding, tokenizer.vocab_size)


_CLIP_BEGIN, _CLIP_END = 49406, 49407


def words(ids: list[int], frame: Frame) -> list[int]:
    """The ids of a caption without begin token, end token, and what follows that."""
    inside = ids[1:] if ids[:1] == [frame.begin] else ids
    return inside[: inside.index(frame.end)] if frame.end in inside else inside


def same_tokens(one: TextSpec, other: TextSpec) -> bool:
    """Whether two specifications make the same ids; every export brings a copy of its tokenizer, in
    a folder of its own.
    """
    if replace(one, tokenizer=other.tokenizer) != other:
        return False

    if one == other:
        return True
    return build(one)(_PROBES).equal(build(other)(_PROBES))


class ClipTokenizer:
    """open_clip's SimpleTokenizer with a fast path. `vocab_size` counts the special tokens too."""

    def __init__(self, spec: TextSpec) -> None:
        # Here, because it imports ftfy and more.
        from vlp.data._clip_text import tokenizers as theirs

        self.context_length = spec.context_length
        self._slow = theirs.SimpleTokenizer(
            context_length=spec.context_length, clean=spec.clean, **spec.options
        )
        self.vocab_size = self._slow.vocab_size

        # What cleaning comes to where the text has no mojibake, entities or control characters to
        # repair.
        cleaners = {
            "lower": _lower,
            "whitespace": _single_spaced,
            "canonicalize": theirs.canonicalize_text,
        }
        self._clean = cleaners[spec.clean]

        self._pattern = regex.compile(_WORD, regex.IGNORECASE)
        self._words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids, int64 [n, L], zero after the end token."""
        return self.tokenize(texts)[0]

    def tokenize(self, texts: list[str]) -> tuple[Tensor, int]:
        """Token ids, int64 [n, L], and how many texts were truncated."""
        length = self.context_length
        first, last = self._slow.sot_token_id, self._slow.eot_token_id

        result = np.zeros((len(texts), length), np.int64)
        n_truncated = 0
        for row, text in zip(result, texts):
            ids = [first, *self.encode(text)]
            if len(ids) >= length:  # no room for the end token
                n_truncated += 1
            # Appends the end token to a short text, and cuts a long one to make room for it.
            ids[length - 1 :] = [last]
            row[: len(ids)] = ids

        return torch.from_numpy(result), n_truncated

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without start, end or truncation."""
        needs_no_repair = text.isascii() and text.isprintable() and "&" not in text
        cleaned = self._clean(text) if needs_no_repair else self._slow.clean_fn(text)

        # No token spans white space, so a text is the sum of its words.
        ids: list[int] = []
        for word in cleaned.split():
            known_ids = self._words.get(word)
            ids += self._spell(word) if known_ids is None else known_ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without begin, end or padding."""
        return self._slow.decode(ids).strip()

    def _spell(self, word: str) -> list[int]:
        """Token ids of one word, kept for the next time it is met."""
        slow = self._slow
        ids: list[int] = []
        for token in self._pattern.findall(word):
            # BPE knows bytes as printable characters.
            token = "".join(slow.byte_encoder[b] for b in token.encode("utf-8"))
            ids.extend(slow.encoder[piece] for piece in slow.bpe(token).split(" "))

        # Started anew: which words are rare is not worth knowing.
        if len(self._words) >= _LIMIT:
            self._words.clear()
            slow.cache.clear()
        self._words[word] = ids
        return ids


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _lower(text: str) -> str:
    return _single_spaced(text).lower()


class HubTokenizer:
    """A Hugging Face tokenizer (`hub`) by name or folder, with the semantics of open_clip's
    HFTokenizer.
    """

    def __init__(self, spec: TextSpec) -> None:
        from vlp.data._clip_text import tokenizers

        # Its folder may bring code along, and options that ask for it.
        options: dict[str, Any] = {**spec.options, "trust_remote_code": False}
        self.context_length = spec.context_length
        place = places.locate(spec.tokenizer)
        self._inner = checked(
            lambda: tokenizers.HFTokenizer(
                place, context_length=spec.context_length, clean=spec.clean, **options
            ),
            spec.tokenizer,
        )
        self.hub = self._inner.tokenizer
        self.vocab_size = len(self.hub)

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids, int64 [n, L], padded as the tokenizer does."""
        return self._inner(texts)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without begin, end or padding."""
        return self.hub.decode(ids, skip_special_tokens=True).strip()

    def tokenize(self, texts: list[str]) -> tuple[Tensor, int]:
        """Token ids, int64 [n, L], and how many texts were truncated."""
        ids = self._inner(texts)
        pad = self.hub.pad_token_id

        # Only rows without padding can have been cut; whether they were, their whole length tells.
        n_truncated = 0
        for text, row in zip(texts, ids):
            if pad is not None and row[-1] == pad:
                continue
            cleaned = self._inner.clean_fn(text)
            whole = self.hub(cleaned, verbose=False).input_ids
            if len(whole) > self.context_length:
                n_truncated += 1

        return ids, n_truncated
