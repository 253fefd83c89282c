"""The wrong captions of a sample's JSON, and the caption that each of them was made from.

`negatives` and `counterfactuals` are lists of texts. `negatives_of` and `counterfactuals_of`, of
the same lengths, number the sample's captions: entry j is the caption that text j was made from, or
−1 (GIVEN) where the text was given for the picture, whatever its caption. A wrong caption is a
minimal pair with its own caption alone, so it is used with that one and with no other; a given one
is used with every caption. Where the second list is missing, all texts count as given. A third list
of the same length, `negatives_valid`, masks texts that shall not count.

Numbers that cannot be right (another length, no caption of that number) cost the sample these
texts, never a wrong pairing: `problem` says what is wrong, and the index counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlp.data.captions import Choice

LISTS = ("negatives", "counterfactuals")
GIVEN = -1


@dataclass(frozen=True)
class WrongCaptions:
    """One of LISTS; entry j of each list is about text j."""

    texts: list[str]  # "" where the JSON's entry is no text
    valid: list[bool]  # it has words and is not masked
    made_from: list[str | None]  # the caption that it was made from; None: given
    problem: str = ""  # why none of the texts is used

    def of(self, caption: str) -> list[int]:
        """The places of the texts that belong to a caption, in their order."""
        belonging = (None, caption.strip())
        return [place for place, source in enumerate(self.made_from) if source in belonging]

    def most(self, captions: Sequence[str]) -> int:
        """How many texts belong to the caption that has most of them; without captions, the given
        ones.
        """
        return max(len(self.of(caption)) for caption in captions or [""])

    def numbers(self, captions: Sequence[str]) -> list[int | None]:
        """For each text the number of its caption among `captions`; GIVEN, or None where it is not
        there.
        """
        # Of equal captions the first counts, so it is entered last.
        number = {caption.strip(): i for i, caption in reversed(list(enumerate(captions)))}
        return [GIVEN if source is None else number.get(source) for source in self.made_from]


def read(meta: dict[str, Any], field: str, captions: Sequence[str]) -> WrongCaptions:
    """The texts of one of LISTS in the JSON of a sample with these captions; empty where it has
    none.
    """
    entries = meta.get(field)
    numbers = meta.get(f"{field}_of")
    if not isinstance(entries, list):
        return WrongCaptions([], [], [])

    # Entries that are no text keep their place: numbers and masks count them.
    texts = [entry if isinstance(entry, str) else "" for entry in entries]
    mask = meta.get(f"{field}_valid")
    if not isinstance(mask, list) or len(mask) != len(texts):
        mask = [True] * len(texts)  # none, or that of other texts
    has_words = [bool(text.strip()) for text in texts]
    valid = [words and bool(counts) for words, counts in zip(has_words, mask)]
    if numbers is None:
        return WrongCaptions(texts, valid, [None] * len(texts))

    # A wrong number would make a wrong pair, so one of them costs all texts.
    numbered = _numbered(meta, captions)
    problem = _problem(field, numbers, len(texts), len(numbered))
    if problem:
        return WrongCaptions([], [], [], problem)
    made_from = [None if n == GIVEN else numbered[n] for n in numbers]
    return WrongCaptions(texts, valid, made_from)


def problems(meta: dict[str, Any], captions: Sequence[str]) -> list[str]:
    """What is wrong with the numbers of a sample's wrong captions, in words."""
    of_each = [read(meta, field, captions).problem for field in LISTS]
    return [problem for problem in of_each if problem]


def _numbered(meta: dict[str, Any], captions: Sequence[str]) -> list[str]:
    """The captions as the JSON numbers them: there may be blank ones, and more than are used."""
    written = meta.get("captions")
    if not isinstance(written, list) or not all(isinstance(caption, str) for caption in written):
        written = Choice().captions(meta, "") or captions
    return [caption.strip() for caption in written]


def _problem(field: str, numbers: Any, n_texts: int, n_captions: int) -> str:
    """What is wrong with the numbers of n texts, in words; "" for nothing."""
    # bool is an int, and true would be caption 1.
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        fault = f"holds {str(numbers)[:40]}"
    elif len(numbers) != n_texts:
        fault = f"has {len(numbers)} numbers for {n_texts} texts"
    else:
        outside = [n for n in numbers if not GIVEN <= n < n_captions]
        if not outside:
            return ""
        fault = f"names caption {outside[0]} of {n_captions}"

    return (
        f"its {field} are not used: {field}_of {fault}; "
        "expected the number of a caption, or −1, for each"
    )
