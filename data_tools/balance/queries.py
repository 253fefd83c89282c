"""Queries: words and phrases by which captions are counted, and which of them a caption holds.

The rule is MetaCLIP's (arXiv 2309.16671, and its `substr_matching.py`): in the caption a blank is
put around each of , . ; : ? ! ` and in place of tabs and ends of lines; a query is in the caption
if it stands there with a blank before and after it. Capitals count. At an edge that is a letter of
a script written without blanks (Chinese, Japanese, Thai, …) none is asked for, as in its
multilingual successor's `get_spaced_metadata`.

Between blanks a substring is a run of words, so words are looked up, not characters: each word by
itself, and from a pair of words on with which a query begins, each length that one has. Measured
with 500,000 queries of 1 to 6 words on captions of 12: 34 thousand captions a CPU second, where an
Aho-Corasick automaton (pyahocorasick, in C) makes 56 thousand, and takes 256 MB and six seconds to
build in each process. Reading shards and matching together: 8 thousand samples a CPU second.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_SPACED = {ord(mark): f" {mark} " for mark in ",.;:?!`"} | {ord(blank): " " for blank in "\t\n\r"}
# Letters of scripts without blanks: Thai, Lao, Tibetan, Burmese, Khmer; kana; Chinese characters.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002fa1f]"
)


class Queries:
    """Numbered queries, each once, that captions are searched for."""

    def __init__(self, texts: Iterable[str], ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case
        lowered = (text.lower() if ignore_case else text for text in texts)
        self.texts = list(dict.fromkeys(lowered))

        # By words where both edges ask for a blank, else by characters.
        self._by_words: dict[str, int] = {}
        self._by_letters: dict[str, int] = {}
        for number, text in enumerate(self.texts):
            before = "" if _WITHOUT_BLANKS.match(text[0]) else " "
            after = "" if _WITHOUT_BLANKS.match(text[-1]) else " "
            if before and after:
                self._by_words[text] = number
            else:
                self._by_letters[before + text + after] = number

    def __len__(self) -> int:
        return len(self.texts)

    def __getstate__(self) -> dict[str, Any]:
        # The tables are larger than the texts, and quickly made.
        return {"texts": self.texts, "ignore_case": self.ignore_case}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["texts"], state["ignore_case"])  # type: ignore[misc]

    def held_by(self, caption: str) -> set[int]:
        """The numbers of the queries that a caption holds."""
        text = f" {caption.translate(_SPACED)} "
        if self.ignore_case:
            text = text.lower()
        numbers = self._words_in(text.split(" "))
        if self._by_letters:
            numbers |= self._letters_in(text)
        return numbers

    def _words_in(self, tokens: list[str]) -> set[int]:
        numbers = {self._by_words[token] for token in tokens if token in self._by_words}
        for start, token in enumerate(tokens[:-1]):
            # Few pairs begin a query, so that most places end here.
            for length in self._lengths.get(f"{token} {tokens[start + 1]}", ()):
                phrase = " ".join(tokens[start : start + length])
                if phrase in self._by_words:
                    numbers.add(self._by_words[phrase])
        return numbers

    def _letters_in(self, text: str) -> set[int]:
        numbers: set[int] = set()
        for start, letter in enumerate(text):
            for length in self._widths.get(letter, ()):
                number = self._by_letters.get(text[start : start + length])
                if number is not None:
                    numbers.add(number)
        return numbers

    @cached_property
    def _lengths(self) -> dict[str, tuple[int, ...]]:
        """How many words the queries have that begin with a pair of words."""
        lengths: dict[str, set[int]] = {}
        for text in self._by_words:
            tokens = text.split(" ")
            if len(tokens) > 1:
                lengths.setdefault(f"{tokens[0]} {tokens[1]}", set()).add(len(tokens))
        return {pair: tuple(sorted(of_pair)) for pair, of_pair in lengths.items()}

    @cached_property
    def _widths(self) -> dict[str, tuple[int, ...]]:
        """How many characters the patterns have that begin with a character."""
        widths: dict[str, set[int]] = {}
        for pattern in self._by_letters:
            widths.setdefault(pattern[0], set()).add(len(pattern))
        return {letter: tuple(sorted(of_letter)) for letter, of_letter in widths.items()}

    def hashes(self) -> np.ndarray:
        """64 bits of each query's text, uint64 [queries]: what is drawn does not depend on its
        number.
        """
        return np.array([hash_of(text) for text in self.texts], np.uint64)

    def digest(self) -> str:
        """What the output depends on."""
        content = "\n".join(self.texts)
        return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def read(path: str, ignore_case: bool = False) -> Queries:
    """The queries of a file: .json, a list of texts, as MetaCLIP's metadata.json; .txt, one a line.
    Raises ValueError.
    """
    expected = "expected a .json with a list of texts, or a .txt with a query a line"
    try:
        content = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--queries {path} cannot be read ({error}); {expected}") from None

    texts: Any = content.splitlines()
    if path.endswith(".json"):
        try:
            texts = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--queries {path} is no JSON ({error}); {expected}") from None
    elif not path.endswith(".txt"):
        raise ValueError(f"--queries {path}: {expected}")

    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"--queries {path} holds other things than a list of texts; {expected}")
    queries = Queries(filter(None, map(str.strip, texts)), ignore_case)
    if not queries:
        raise ValueError(f"--queries {path} holds no query; {expected}")
    return queries


def hash_of(text: str) -> int:
    """64 bits of a text."""
    hashed = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(hashed, "little")
