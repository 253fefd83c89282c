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
from typing import Any, Literal

from vlp.data.tables import TableOptions
from vlp.eval import choices as _choices
from vlp.eval import embed
from vlp.eval.datasets import Source
from vlp.eval.pictures import DataError
from vlp.eval.tasks import TaskResult, retrieval, shared

VERSION = 2  # 1 took equal pictures for several images
KNOWN_AS = "image_caption_selection"
WORD = re.compile(r"\w+(?:['’]\w+)?|[^\w\s]")
Tagger = Callable[[str], list[tuple[str, str]]]  # caption -> (word, "noun", "adjective" or "other")

_OTHER = """
a an the this that these those some any each every all both no its his her their our my your it he she they we you i him
them us me who which what there here and or but nor so if while as than because until though when where in on at by of to
from with without into onto over under above below near beside besides behind between among through across along around
about against during before after up down out off inside outside toward towards upon for is are was were be been being am
has have had do does did can could will would may might must should not very too also just only then sits sit sat stands
stand stood holds hold held looks look rides ride plays play eats eat walks walk runs run wears wear lies lie lays lay shows
show sleeps sleep flies fly hangs hang leans lean watches watch makes make takes take gets get goes go comes come gives give
puts put one two three four five six seven eight nine ten
"""
OTHER = frozenset(_OTHER.split())  # neither nouns nor adjectives in a caption


@dataclass(frozen=True)
class Options(TableOptions):
    """Which captions, and how they are shuffled."""

    data: str  # as for retrieval
    images: str | None = None  # where a table's images are: a folder or a .tar; None: beside it
    split: str = "test"  # which split of the data is scored
    # spacy: the paper's tags (needs spaCy); words: our approximation without it
    tagger: Literal["spacy", "words"] = "spacy"
    max_words: int = 30  # captions are cut to so many
    seed: int = 0  # of the shufflings
    missing: Literal["error", "skip"] = "error"  # annotations without their image


@dataclass
class Data:
    """The images and captions, and the four shufflings of each caption."""

    source: Source
    choices: list[list[str]]  # by caption: itself, then its rivals


def read(options: Options) -> Data:
    source = retrieval.read(shared(retrieval.Options, options))
    tag = _spacy() if options.tagger == "spacy" else by_words
    captions = [caption for r in source.records for caption in r.captions]
    return Data(
        source, [choices(caption, tag, options.max_words, options.seed) for caption in captions]
    )


def choices(caption: str, tag: Tagger, max_words: int, seed: int) -> list[str]:
    """The caption and those of its four shufflings that differ from it. A pure function of caption
    and seed.
    """
    chance = random.Random(hashlib.sha256(f"{seed} {caption}".encode()).digest())
    tagged = tag(caption)
    words = [word for word, _ in tagged]
    nouns, adjectives, others = (
        [i for i, (_, kind) in enumerate(tagged) if kind == wanted]
        for wanted in ("noun", "adjective", "other")
    )
    plain = WORD.findall(caption)
    threes = [plain[i : i + 3] for i in range(0, len(plain), 3)]
    shuffled = [
        _shuffled(_shuffled(words, nouns, chance), adjectives, chance),
        _shuffled(words, others, chance),
        [word for three in threes for word in chance.sample(three, len(three))],
        [word for three in chance.sample(threes, len(threes)) for word in three],
    ]
    own = clean(caption, max_words)
    rivals = [clean(" ".join(s), max_words) for s in shuffled]
    return [
        own,
        *(r for r in rivals if r.split() != clean(" ".join(plain), max_words).split() and r != own),
    ]


def clean(caption: str, max_words: int) -> str:
    """ARO's clean-up: lower case, some punctuation to blanks, one blank between words, cut to
    `max_words`.
    """
    words = re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()
    return " ".join(words[:max_words])


def by_words(caption: str) -> list[tuple[str, str]]:
    """Tags without a model: adjectives stand before another content word, nouns are the other
    content words.
    """
    words = WORD.findall(caption)
    content = [
        w[0].isalpha() and w.lower() not in OTHER and not re.search(r"(ing|ed|ly)$", w.lower())
        for w in words
    ]
    following = [*content[1:], False]
    kinds = ["other" if not c else "adjective" if f else "noun" for c, f in zip(content, following)]
    return list(zip(words, kinds))


def _spacy() -> Tagger:
    try:
        import spacy

        model = spacy.load("en_core_web_sm")
    except (ImportError, OSError) as error:
        raise DataError(
            f"the published order sets need spaCy and its model en_core_web_sm ({error}); install them, or pass tagger=words "
            "for an approximation whose scores compare only with each other"
        ) from error
    kind = {"NN": "noun", "JJ": "adjective"}  # NNS, NNP, JJR, … begin alike
    return lambda caption: [(t.text, kind.get(t.tag_[:2], "other")) for t in model(caption)]


def _shuffled(words: list[str], places: list[int], chance: random.Random) -> list[str]:
    result = list(words)
    for place, source in zip(places, chance.sample(places, len(places))):
        result[place] = words[source]
    return result


def run(encoder: Any, data: Data, options: Options, context: embed.Context) -> TaskResult:
    pictures = [r.picture for r in data.source.records for _ in r.captions]
    hits = _choices.first_is_best(_choices.cosines(encoder, pictures, data.choices, context))
    n_equal = sum(5 - len(c) for c in data.choices)
    return TaskResult(
        data.source.name,
        items={"precision@1": _choices.accuracy(hits)},
        chance={"precision@1": sum(1 / len(c) for c in data.choices) / len(data.choices)},
        counts={
            "captions": len(hits),
            "shufflings_equal_to_caption": n_equal,
            "skipped": len(data.source.skipped),
        },
        digest=context.digest(pictures, data.choices),
    )
