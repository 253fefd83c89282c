"""The order of two events in a caption, told the other way round: what happened before, after.

"a dog barks before a cat jumps" → "a dog barks after a cat jumps", and what followed by what
exchanged. "before" and "after" also tell places ("a man before a mirror"), hours and names: a
caption is changed only where an event stands on both sides.
"""

from __future__ import annotations

import re
from collections import Counter

from vlp.data_tools._english.words import edit, words
from vlp.data_tools.negatives.lexicon import Lexicon

_OPPOSITE = {"before": "after", "after": "before"}
# What stands beside them where they tell no order of events, or one that has no opposite.
_NO_ORDER = re.compile(
    r"\b((day|night|week|month|year|hour|minute|moment|one|time|look|named|and|or|ever|never)"
    r" (before|after)|(before|after) (and|or|all|that|this|long))\b",
    re.I,
)
_FOLLOWED = re.compile(r"^(?P<first>.+?),? followed by (?P<second>.+?)(?P<end>[.!]?)$", re.I)
_BEGINS = re.compile(r"^(A|An|The|One|Two|Some)\b")
_SUBJECTS = {"he", "she", "it", "they", "we", "someone", "somebody", "everyone"}
_NO_VERBS = {"during", "morning", "evening", "ceiling", "building", "thing", "something", "nothing"}


def exchanged(
    caption: str, lexicon: Lexicon, passed: Counter[str]
) -> tuple[str, frozenset[str]] | None:
    """The caption with the order of its two events exchanged, and the words that this brought in;
    None where it tells none.
    """
    connectives = [word for word in words(caption) if word.text in _OPPOSITE]
    if len(connectives) == 1:
        connective = connectives[0]
        first, second = caption[: connective.start], caption[connective.end :]
        # "After a man falls, a dog barks": the first event ends at the comma.
        if not first.strip():
            first, _, second = second.partition(",")
        in_time = has_event(first, lexicon) and has_event(second, lexicon)
        if _NO_ORDER.search(caption) or not in_time:
            passed["swap_time: before or after, and not of two events"] += 1
            return None
        new = _OPPOSITE[connective.text]
        return edit(caption, [(connective.start, connective.end, new)]), frozenset({new})

    followed = _FOLLOWED.match(caption)
    if followed is None or connectives or followed["second"].lower().count(" followed by "):
        return None
    first, second, end = followed["first"], followed["second"], followed["end"]
    # The first letter is the caption's, not the word's.
    if _BEGINS.match(first):
        first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
    return f"{second} followed by {first}{end}", frozenset()


def has_event(part: str, lexicon: Lexicon) -> bool:
    """Whether a part of a caption tells that something happens: a word ending in -ing, a pronoun
    that does something, or a verb right after a known noun.
    """
    texts = [word.text for word in words(part)]
    if any(text.endswith("ing") and text not in _NO_VERBS for text in texts):
        return True
    if any(text in _SUBJECTS for text in texts[:-1]):
        return True

    nouns = lexicon.mentions(part, "nouns")
    after_nouns = [words(part[noun.end :])[:1] for noun in nouns]
    next_words = [word[0].text for word in after_nouns if word]
    known = lexicon.entries["nouns"]
    return any(word.endswith(("s", "ed")) and word not in known for word in next_words)
