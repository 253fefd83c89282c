"""Word-order shuffles of a caption: the four of ARO's order sets (arXiv 2210.01936, appendix),
without a tagger.

ARO tells nouns and adjectives apart with a part-of-speech model; here every word that is not a
function word counts as one.
"""

from __future__ import annotations

import random

_FUNCTION_WORDS = """
a an the this that these those some any each every all both another other is are was were be been being am has have had do does
did can could will would and or but nor so yet if while as than then of in on at to from by with without for into onto over under
above below near behind beside between among across along around through up down off out about against it its he him his she her
they them their we our you your i me my there here who which what where when whose not no left right top bottom front next
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def shuffles(text: str, rng: random.Random) -> dict[str, str]:
    """Kind → shuffled caption, for every kind that changes the caption; equal results are kept
    once.

    Content words must change in three places: exchanging two may say the same ("a man walking", "a
    walking man").
    """
    words = text.rstrip(".").split()
    end = text[len(text.rstrip(".")) :]
    content = [i for i, word in enumerate(words) if word.lower().strip(",") not in FUNCTION_WORDS]
    function = sorted(set(range(len(words))) - set(content))
    trigrams = [words[i : i + 3] for i in range(0, len(words), 3)]
    results = {
        "order_content_words": _permuted_at(words, content, rng),
        "order_function_words": _permuted_at(words, function, rng),
        "order_within_trigrams": [word for part in trigrams for word in _permuted(part, rng)],
        "order_trigrams": [word for part in _permuted(trigrams, rng) for word in part],
    }
    found: dict[str, str] = {}
    for kind, shuffled in results.items():
        n_moved = sum(a != b for a, b in zip(words, shuffled))
        sentence = " ".join(shuffled) + end
        if (
            n_moved >= (3 if kind == "order_content_words" else 1)
            and sentence not in found.values()
        ):
            found[kind] = sentence
    return found


def _permuted(items: list, rng: random.Random) -> list:
    """Of some random orders the one that leaves the fewest items in their places."""
    tries = [rng.sample(items, len(items)) for _ in range(6)]
    return max(tries, key=lambda order: sum(a != b for a, b in zip(items, order)))


def _permuted_at(words: list[str], places: list[int], rng: random.Random) -> list[str]:
    result = list(words)
    for place, word in zip(places, _permuted([words[i] for i in places], rng)):
        result[place] = word
    return result
