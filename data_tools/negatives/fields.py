"""The fields of a sample's JSON that hold negatives, and which candidates may stand in them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from vlp.data.wrong_captions import GIVEN

if TYPE_CHECKING:
    from vlp.data_tools.negatives.rules import Negative

# What was written for earlier negatives goes with them.
_OF_EARLIER = ("negative_scores", "positive_score", "negative_keys")


def with_negatives(
    meta: dict[str, Any], chosen: list[tuple[Negative, int]], counts: Counter[str]
) -> dict[str, Any]:
    """A sample's JSON with these negatives, each beside the number of its caption, instead of
    earlier ones.
    """
    if meta.get("negatives"):
        counts["samples whose earlier negatives were replaced"] += 1
    counts["samples with negatives" if chosen else "samples without negatives"] += 1
    counts.update(f"negatives written: {negative.kind}" for negative, _ in chosen)

    kept = {name: value for name, value in meta.items() if name not in _OF_EARLIER}
    return kept | {
        "negatives": [negative.text for negative, _ in chosen],
        "negatives_valid": [True] * len(chosen),
        "negative_kinds": [negative.kind for negative, _ in chosen],
        "negatives_of": [number for _, number in chosen],
    }


def valid(
    candidates: list[tuple[Negative, int]], captions: list[str], counts: Counter[str]
) -> list[tuple[Negative, int]]:
    """The candidates, ordered by the number of their caption, that captions do not show to be true;
    the others are counted.
    """
    from vlp.data_tools._english.words import bare

    kept: list[tuple[Negative, int]] = []
    # Compared as bare words: a capital or a full stop makes no other caption.
    true = {bare(caption) for caption in captions}
    seen: set[tuple[str, int]] = set()  # text, number of its caption
    for i, group in itertools.groupby(candidates, key=lambda candidate: candidate[1]):
        # One text of all other captions: they are searched for every new word.
        others = " \n ".join(caption for j, caption in enumerate(captions) if j != i).lower()
        for negative, _ in group:
            text = bare(negative.text)
            if not text:
                reason = "empty"
            elif text in true:
                reason = "equal to a caption"
            elif any(_says(others, word) for word in negative.new_words):
                reason = "says what another caption of the picture says"
            elif not seen.isdisjoint({(text, i), (text, GIVEN)}):
                reason = "repeated"
            else:
                seen.add((text, i))
                kept.append((negative, i))
                continue
            counts[f"dropped: {reason}"] += 1
    return kept


def _says(captions: str, word: str) -> bool:
    """Whether a word stands in captions; the plain search first, because it is much the faster."""
    return word in captions and re.search(rf"\b{re.escape(word)}\b", captions) is not None
