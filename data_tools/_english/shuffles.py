"""Word-order shuffles of a caption: the four of ARO's order sets (arXiv 2210.01936, appendix),
without a tagger.

ARO tells nouns and adjectives apart with a part-of-speech model; here every word that is not a
function word counts as one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import chain

_FUNCTION_WORDS = """
a an the this that these those some any each every all both another other is are was were be been
being am has have had do does did can could will would and or but nor so yet if while as than then
of in on at to from by with without for into onto over under above below near behind beside
between among across along around through up down off out about against it its he him his she her
they them their we our you your i me my there here who which what where when whose not no left
right top bottom front next
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
    is_function = [word.lower().strip(",") in FUNCTION_WORDS for word in words]
    content = [i for i, is_one in enumerate(is_function) if not is_one]
    function = [i for i, is_one in enumerate(is_function) if is_one]
    trigrams = [words[i : i + 3] for i in range(0, len(words), 3)]

    # In this order, which the random state is drawn in.
    orders = {
        "order_content_words": _permuted_at(words, content, rng),
        "order_function_words": _permuted_at(words, function, rng),
        "order_within_trigrams": _joined(_permuted(part, rng) for part in trigrams),
        "order_trigrams": _joined(_permuted(trigrams, rng)),
    }

    shuffled: dict[str, str] = {}
    for kind, order in orders.items():
        sentence = " ".join(order) + end
        n_least = 3 if kind == "order_content_words" else 1
        if _n_moved(words, order) >= n_least and sentence not in shuffled.values():
            shuffled[kind] = sentence
    return shuffled


def _joined(parts: Iterable[list[str]]) -> list[str]:
    return list(chain.from_iterable(parts))


def _n_moved(before: list, after: list) -> int:
    return sum(1 for a, b in zip(before, after) if a != b)


def _permuted(items: list, rng: random.Random) -> list:
    """Of some random orders the one that leaves the fewest items in their places."""
    orders = [rng.sample(items, len(items)) for _ in range(6)]
    return max(orders, key=lambda order: _n_moved(items, order))


def _permuted_at(words: list[str], places: list[int], rng: random.Random) -> list[str]:
    permuted = _permuted([words[place] for place in places], rng)
    result = list(words)
    for place, word in zip(places, permuted):
        result[place] = word
    return result
