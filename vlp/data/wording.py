"""Captions in other words: the text side of augmented views (CLIP-rocket, Fini et al. 2023; EDA,
Wei & Zou 2019).
"""

from __future__ import annotations

import random

from vlp.config import TextAugment

_STOP_WORDS = """
    a an the this that these those of in on at by to for from with as and or but
    is are was were be been being am it its there here some very just so
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
# Words of one line can stand for one another in most captions: equal in number and form, and after
# the same article.
_GROUPS = """
    big large
    small little tiny
    photo picture photograph
    photos pictures photographs
    man guy gentleman
    men guys gentlemen
    woman lady
    women ladies
    child kid
    children kids
    boy lad
    dog hound
    street road
    house home
    bike bicycle
    bikes bicycles
    couch sofa
    shop store
    shops stores
    stone rock
    stones rocks
    forest wood
    beautiful pretty lovely
    happy cheerful
    fast quick rapid
    below beneath
    beside near
    several various
    shiny glossy
    wet damp
    dirty muddy
    bright vivid
    running jogging
    jumping leaping
    looking gazing
    holding carrying
    smiling grinning
    talking speaking chatting
    walking strolling
    shouting yelling
    cup mug
    plate dish
    meal dinner
    hill mound
    path trail
    garden yard
    boat vessel
    coat jacket
    hat cap
    television tv
    phone telephone
    bunch group
    center middle
    seaside coast
"""
SYNONYMS: dict[str, tuple[str, ...]] = {}
for _line in _GROUPS.splitlines():
    _group = _line.split()
    for _word in _group:
        SYNONYMS[_word] = tuple(other for other in _group if other != _word)


def vary(caption: str, augment: TextAugment, chance: random.Random) -> str:
    """The caption with words left out, replaced and exchanged, in the order of `TextAugment`; never
    empty.

    A pure function of its arguments and the state of `chance`.
    """
    # The order of the draws is part of what a seed means: each step draws for all its words.
    words = []
    for word in caption.split():
        left_out = word.lower() in STOP_WORDS and chance.random() < augment.stop_words
        if not left_out:
            words.append(word)

    for i, word in enumerate(words):
        if chance.random() < augment.synonyms:
            words[i] = _synonym(word, chance)

    for i in range(len(words) - 1):
        if chance.random() < augment.swaps:
            words[i], words[i + 1] = words[i + 1], words[i]

    # A view without words would be a caption of every picture.
    kept_words = [word for word in words if chance.random() >= augment.deletions]
    return " ".join(kept_words or words) or caption


def _synonym(word: str, chance: random.Random) -> str:
    """Another word of the same meaning, with the capital and the punctuation of `word`; the word
    itself if none is known.
    """
    core = word.strip(".,;:!?\"'()")
    others = SYNONYMS.get(core.lower())
    if others is None:
        return word

    other = chance.choice(others)
    if core[0].isupper():
        other = other.capitalize()
    return word.replace(core, other)
