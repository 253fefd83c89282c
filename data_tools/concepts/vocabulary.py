"""The concepts that a data set is labelled with, numbered, as a table in a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vlp.data_tools.concepts.wordnet import Nouns
from vlp.files import write_atomically

FILE = "concepts.tsv"
_HEAD = "number\tsynset\toffset\tsamples"
_SUFFIX = ".n.01"
_EXPECTED = f"expected {FILE} of `vlp data concepts`, whose first line is {_HEAD!r}"


@dataclass(frozen=True)
class Vocabulary:
    """Concept number i is words[i]."""

    words: list[str]
    offsets: list[int]  # of their synsets, in WordNet's data.noun
    counts: list[int]  # of the samples that name each, in the set that was counted

    @classmethod
    def of(cls, counts: Counter[str], nouns: Nouns, min_count: int, top: int | None) -> Vocabulary:
        """The concepts that at least `min_count` samples name, at most `top`, the commonest first.
        ValueError where there is none.
        """
        by_count = sorted(counts, key=lambda word: (-counts[word], word))
        words = [word for word in by_count if counts[word] >= min_count][:top]
        if not words:
            commonest = ", ".join(f"{word} {counts[word]:,}" for word in by_count[:3])
            raise ValueError(
                f"no concept is named by {min_count:,} samples (the commonest: "
                f"{commonest or 'none at all'}); lower --min-count, or look at the captions"
            )
        return cls(words, [nouns.synsets[word] for word in words], [counts[w] for w in words])

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each concept's word."""
        return {word: number for number, word in enumerate(self.words)}

    def check(self, nouns: Nouns) -> None:
        """Raise ValueError where another WordNet has other synsets under these words."""
        for word, offset in zip(self.words, self.offsets):
            if nouns.synsets.get(word) != offset:
                raise ValueError(
                    f"--vocabulary has {word}{_SUFFIX} at {offset:08d}, and this WordNet has it "
                    f"{_at(nouns.synsets.get(word))}; name the one that it was made with: --wordnet"
                )

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        rows = zip(self.words, self.offsets, self.counts)
        lines = [
            f"{number}\t{word}{_SUFFIX}\t{offset:08d}\t{count}"
            for number, (word, offset, count) in enumerate(rows)
        ]
        write_atomically(path, "\n".join([_HEAD, *lines, ""]).encode())

    def digest(self) -> str:
        """What the labels depend on."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]


def _at(offset: int | None) -> str:
    return "not" if offset is None else f"at {offset:08d}"


def read(path: str) -> Vocabulary:
    """The table of a file; ValueError where it is none."""
    from vlp.data.stored import source

    try:
        head, *lines = source(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--vocabulary {path} cannot be read ({error}); {_EXPECTED}") from None
    if head != _HEAD or not lines:
        raise ValueError(
            f"--vocabulary {path}: found {head[:60]!r} and {len(lines)} rows; {_EXPECTED}"
        )

    words, offsets, counts = [], [], []
    for place, line in enumerate(lines):
        fields = line.split("\t")
        in_order = len(fields) == 4 and fields[0] == str(place) and fields[1].endswith(_SUFFIX)
        if not in_order or not (fields[2] + fields[3]).isdecimal():
            raise ValueError(f"--vocabulary {path}: row {place} is {line[:60]!r}; {_EXPECTED}")
        words.append(fields[1].removesuffix(_SUFFIX))
        offsets.append(int(fields[2]))
        counts.append(int(fields[3]))
    if len(set(words)) < len(words):
        raise ValueError(f"--vocabulary {path} has a synset twice; {_EXPECTED}")
    return Vocabulary(words, offsets, counts)
