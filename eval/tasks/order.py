"""ARO's order sets (Yuksekgonul et al. 2023): the caption against four shufflings of its own words,
COCO and Flickr30k.

Shuffled are nouns and adjectives, all other words, the words inside each group of three, the groups
of three. All five are then put in lower case, without `. ! " ( ) * # : ; ~`, cut to 30 words; the
caption must score highest (P@1 of 5). The original takes argmax with the caption first, so it wins
ties: a shuffling that gives the caption's own words again is therefore no rival here, and every
other tie is wrong, which differs only for encoders that ignore the text.

The sets are not published but generated: the paper with spaCy's tags, nltk's words and numpy's
chance. With `tagger: spacy` (needs spaCy and en_core_web_sm) words are tagged as there; `tagger:
words` tells nouns and adjectives by what they are not (function words, usual verbs, -ing, -ed,
-ly), needs nothing, and is our own approximation.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlp.data.tables import TableOptions
from vlp.eval import choices
from vlp.eval.choices import CaptionChoice, ChoiceSet
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval, shared

VERSION = 3  # 1 took equal pictures for several images; 2 tied what a collapsed model tells apart
KNOWN_AS = "image_caption_selection"
MAIN = "precision@1"
SCORES = ("precision@1",)
WORD = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")
Tagger = Callable[[str], list[tuple[str, str]]]  # caption -> (word, "noun", "adjective" or "other")

_OTHER = """
a an the this that these those some any each every all both no its his her their our my your it he
she they we you i him them us me who which what there here and or but nor so if while as than
because until though when where in on at by of to from with without into onto over under above below
near beside besides behind between among through across along around about against during before
after up down out off inside outside toward towards upon for is are was were be been being am has
have had do does did can could will would may might must should not very too also just only then
sits sit sat stands stand stood holds hold held looks look rides ride plays play eats eat walks walk
runs run wears wear lies lie lays lay shows show sleeps sleep flies fly hangs hang leans lean
watches watch makes make takes take gets get goes go comes come gives give puts put one two three
four five six seven eight nine ten
"""
OTHER = frozenset(_OTHER.split())  # neither nouns nor adjectives in a caption


@dataclass(frozen=True)
class Options(TableOptions):
    """Which captions, and how they are shuffled."""

    data: str  # as for retrieval
    images: str | None = None  # as for retrieval
    split: str = "test"  # which split of the data is scored
    tagger: Literal["spacy", "words"] = "spacy"  # who tells nouns and adjectives
    max_words: int = 30  # longer captions are cut
    seed: int = 0  # of the shufflings
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass
class Data(ChoiceSet):
    """Each caption with those of its four shufflings that are its rivals."""

    name: str = ""


def read(options: Options) -> Data:
    """Each caption of the set with its shufflings."""
    source = retrieval.read(shared(retrieval.Options, options))
    tag = _spacy() if options.tagger == "spacy" else by_words
    items = []
    for record in source.records:
        for caption in record.captions:
            rivals = candidates(caption, tag, options.max_words, options.seed)
            items.append(CaptionChoice(record.picture, rivals))
    return Data(items, source.skipped, name=source.name)


def candidates(caption: str, tag: Tagger, max_words: int, seed: int) -> list[str]:
    """The caption and those of its four shufflings that differ from it.

    A pure function of caption and seed.
    """
    # Of caption and seed alone: neither the order of the set nor other captions matter.
    chance = random.Random(hashlib.sha256(f"{seed} {caption}".encode()).digest())
    words = WORD.findall(caption)
    shufflings = _by_tags(tag(caption), chance) + _by_threes(words, chance)

    # A shuffling with the words of the caption in its order is no rival.
    cleaned = clean(caption, max_words)
    same_words = clean(" ".join(words), max_words).split()
    rivals = [clean(" ".join(shuffled), max_words) for shuffled in shufflings]
    differing = [rival for rival in rivals if rival.split() != same_words and rival != cleaned]
    return [cleaned, *differing]


def _by_tags(tagged: list[tuple[str, str]], chance: random.Random) -> list[list[str]]:
    """Nouns and adjectives shuffled among themselves; all other words shuffled."""
    words = [word for word, _ in tagged]
    places: dict[str, list[int]] = {"noun": [], "adjective": [], "other": []}
    for place, (_, kind) in enumerate(tagged):
        places[kind].append(place)

    # Nouns trade places with nouns, adjectives with adjectives: the sentence stays grammatical.
    nouns_shuffled = _shuffled(words, places["noun"], chance)
    nouns_and_adjectives = _shuffled(nouns_shuffled, places["adjective"], chance)
    return [nouns_and_adjectives, _shuffled(words, places["other"], chance)]


def _by_threes(words: list[str], chance: random.Random) -> list[list[str]]:
    """The words inside each group of three shuffled; the groups of three shuffled."""
    threes = [words[i : i + 3] for i in range(0, len(words), 3)]
    within = []
    for three in threes:
        within += chance.sample(three, len(three))

    groups = []
    for three in chance.sample(threes, len(threes)):
        groups += three
    return [within, groups]


def clean(caption: str, max_words: int) -> str:
    """ARO's clean-up: lower case, some punctuation to blanks, one blank between words, cut to
    `max_words`.
    """
    # Without this, capitals and full stops would give the caption's own order away.
    words = re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()
    return " ".join(words[:max_words])


def by_words(caption: str) -> list[tuple[str, str]]:
    """Tags without a model: adjectives stand before another content word, nouns are the other
    content words.
    """
    words = WORD.findall(caption)
    # "small brown dog": what another content word follows is taken for an adjective.
    is_content = [_is_content(word) for word in words]

    tagged = []
    for word, content, next_is_content in zip(words, is_content, [*is_content[1:], False]):
        kind = "other"
        if content:
            kind = "adjective" if next_is_content else "noun"
        tagged.append((word, kind))
    return tagged


def _is_content(word: str) -> bool:
    """Whether a word is a noun or an adjective, by what it is not."""
    lower = word.lower()
    return word[0].isalpha() and lower not in OTHER and not re.search(r"(ing|ed|ly)$", lower)


def _spacy() -> Tagger:
    """A tagger as in the paper; a DataError says what must be installed."""
    try:
        import spacy

        model = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise DataError(
            f"the published order sets need spaCy and its model en_core_web_sm ({error}); "
            "install them, or pass tagger=words for an approximation whose scores compare only "
            "with each other"
        ) from error

    kinds = {"NN": "noun", "JJ": "adjective"}  # NNS, NNP, JJR, … begin alike

    def tag(caption: str) -> list[tuple[str, str]]:
        return [(token.text, kinds.get(token.tag_[:2], "other")) for token in model(caption)]

    return tag


def _shuffled(words: list[str], places: list[int], chance: random.Random) -> list[str]:
    """The words with those at `places` exchanged among themselves."""
    result = list(words)
    for place, origin in zip(places, chance.sample(places, len(places))):
        result[place] = words[origin]
    return result


def run(encoder: Encoder, data: Data, options: Options, context: Context) -> TaskResult:
    """How often a caption is above all its shufflings."""
    pictures, captions = data.pictures, data.captions
    hits = choices.first_is_best(choices.cosines(encoder, pictures, captions, context))
    # A caption has fewer than four rivals where a shuffling says the same.
    n_equal = sum(5 - len(group) for group in captions)
    return TaskResult(
        data.name,
        items={"precision@1": choices.accuracy(hits)},
        chance={"precision@1": choices.chance(captions)},
        counts={
            "captions": len(hits),
            "shufflings_equal_to_caption": n_equal,
            "skipped": len(data.skipped),
        },
        digest=context.digest(pictures, captions),
    )
