"""Hard-negative captions by rule: exchange, replace or reorder words so that a true caption becomes
a false one.

A rule proposes (kind, text) pairs for one caption. It would rather propose nothing than bad English
or a caption that may still be true; why a caption was passed over is counted. All rules are pure
functions of (caption, random state).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations, pairwise

from vlp.data_tools._english.numbers import NUMBERS, counts, exchange
from vlp.data_tools._english.shuffles import FUNCTION_WORDS, shuffles
from vlp.data_tools._english.words import bare, edit, words
from vlp.data_tools.negatives import events
from vlp.data_tools.negatives.lexicon import Lexicon, Mention

# Characters of a caption that are changed: text towers read 77 tokens of it, the longest in use
# 248.
HEAD = 1_200
_NEGATION = re.compile(
    r"\b(no|not|none|never|neither|nor|nothing|nobody|without|cannot|\w+n['’]t)\b", re.I
)
_PRONOUN = re.compile(
    r"\b(he|she|him|her|his|hers|himself|herself|men's|women's|man's|woman's)\b", re.I
)
# "a case with a lid", but neither "filled with" nor "with one leg in the air"; the | stands where
# the word before ends and what is taken away begins
_WITH_A_PART = re.compile(
    r"\b(?!\w+(?:ed|ing|en)\b)"
    r"(?!(?:all|busy|full|up|together|along|down|is|are|those|people)\b)\w+ with\|\s+"
    r"(?!(?:\d+|one|some|both|several|many|multiple|various|few|his|her|its|their|each|other|all"
    rf"|no|lots|a lot|{'|'.join(NUMBERS)})\b)",
    re.I,
)
_EXISTS = re.compile(r"\b(there (is|are)|one of)\b", re.I)
_DOUBLED = re.compile(r"\b(\w+)(?:,| and| or)* \1\b", re.I)  # "yellow and yellow", "box box"
_BE = {"is", "are", "was", "were"}
_DETERMINERS = {
    "a", "an", "the", "one", "some", "another", "other", "its", "their", "his", "her", "many",
    *NUMBERS,
}  # fmt: skip
_BEFORE_VERBS = {
    "to", "can", "could", "will", "would", "they", "we", "you", "people", "men", "women", "who",
    "that",
}  # fmt: skip
_GROWN = {"people", "person", "adult", "adults", "couple", "player", "players", "ladies"}
_CHILDREN = {"children", "child", "kid", "kids", "baby", "babies", "toddler"}
_JOINING = {"and", "or", "with"}  # "a red cup and a blue cup": exchanging the colors says the same
# between two nouns: words that say different things of the left and the right noun
_TAKES_PARTS = {
    "on", "in", "under", "above", "below", "over", "behind", "inside", "underneath", "beneath",
    "atop", "front", "holding", "chasing", "pulling", "carrying", "watching", "eating", "pushing",
    "feeding", "petting", "facing", "kissing", "hugging",
}  # fmt: skip
_EQUAL_PARTS = {
    "and", "or", "near", "beside", "next", "by", "of", "between", "with", "alongside", "around",
    "that", "which", "who",
}  # fmt: skip


@dataclass(frozen=True)
class Negative:
    """A wrong caption, how it was made, and the words it brought in."""

    kind: str
    text: str
    new_words: frozenset[str] = frozenset()


def head(caption: str) -> str:
    """The part of a caption that rules look at: whole words within its first HEAD characters."""
    if len(caption) <= HEAD:
        return caption
    cut = caption[: HEAD + 1]
    return cut[: cut.rfind(" ")] if " " in cut else cut[:HEAD]


def propose(
    caption: str, lexicon: Lexicon, rng: random.Random, kinds: tuple[str, ...], passed: Counter[str]
) -> list[Negative]:
    """All negatives that the rules of `kinds` (keys of RULES) find for a caption; `passed` counts
    why others did not.
    """
    # What is exchanged in "no dog" may leave it true; shuffled words are wrong all the same.
    if _NEGATION.search(caption):
        passed["the caption says what is not there"] += 1
        kinds = tuple(kind for kind in kinds if kind == "order")

    proposed: list[Negative] = []
    for kind in kinds:
        proposed += RULES[kind](caption, lexicon, rng, passed)

    unchanged = bare(caption)
    changed = [negative for negative in proposed if bare(negative.text) != unchanged]
    return [
        negative
        for negative in changed
        if negative.kind.startswith("order") or not _DOUBLED.search(negative.text)
    ]


# --- exchanging words within a caption ---


def _swap_attribute(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    attributes = []
    for mention in lexicon.mentions(caption, "attributes"):
        noun = _head(caption, mention, lexicon)
        if noun is not None:
            attributes.append((mention, noun))

    for (a, noun_a), (b, noun_b) in combinations(attributes, 2):
        if a.entry.list != b.entry.list or a.entry.cluster == b.entry.cluster:
            continue

        # "a red cup and a blue cup" says the same with the colors exchanged.
        between = [word.text for word in words(caption[a.end : b.start])]
        alike = noun_a == noun_b and not _distinguishes(between, noun_a, lexicon)
        if alike or _stands_alone(between, noun_a):
            passed["swap_attribute: exchanged, the caption would say the same"] += 1
            continue
        yield Negative("swap_attribute", _exchanged(caption, a, b))


def _exchanged(caption: str, a: Mention, b: Mention) -> str:
    return edit(caption, [(a.start, a.end, b.entry.text), (b.start, b.end, a.entry.text)])


def _stands_alone(between: list[str], noun: str) -> bool:
    """Whether both attributes belong to one noun: "red and yellow apple", "large wet dog"."""
    return noun not in between and not set(between) & _BE


def _distinguishes(between: list[str], noun: str, lexicon: Lexicon) -> bool:
    """Whether the words between two equal nouns tell them apart: "above" does, "and a large" does
    not.
    """
    neutral = {noun} | _DETERMINERS | _JOINING | _BE | set(lexicon.entries["attributes"])
    return any(not word.isdigit() for word in set(between) - neutral)


def _swap_noun(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    # Places are left out, and so is the first part of a compound such as "dog house".
    nouns = [
        noun
        for noun in lexicon.mentions(caption, "nouns")
        if noun.entry.section != "place" and _ends_its_phrase(caption, noun)
    ]
    for a, b in pairwise(nouns):
        # A thing for a person, or one for many, would break the sentence.
        same_form = a.entry.section == b.entry.section and a.entry.number == b.entry.number
        if a.entry.text == b.entry.text or not same_form:
            continue

        between = {word.text for word in words(caption[a.end : b.start])}
        if between & _EQUAL_PARTS or not between & _TAKES_PARTS:
            passed["swap_noun: exchanged, the caption might still be true"] += 1
            continue
        yield Negative("swap_noun", _exchanged(caption, a, b))


def _ends_its_phrase(caption: str, noun: Mention) -> bool:
    """Whether no further noun follows, as in "dog house"."""
    after = re.match(r"\s+([^\W\d_]+)", caption[noun.end :])
    return after is None or after[1].lower() in FUNCTION_WORDS or after[1].endswith("ing")


# --- replacing words by others of their list ---


def _replace_attribute(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    for attribute in lexicon.mentions(caption, "attributes"):
        if _head(caption, attribute, lexicon) is not None:
            yield from _replace(caption, attribute, "attributes", lexicon, rng)


def _replace_noun(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    for noun in lexicon.mentions(caption, "nouns"):
        if noun.entry.list in ("person", "child") and _PRONOUN.search(caption):
            passed["replace_noun: a pronoun would no longer agree"] += 1
            continue

        # "sheep" may stand for one or for many.
        if noun.entry.number == "any" or _is_verb(caption, noun):
            continue
        yield from _replace(caption, noun, "nouns", lexicon, rng)


def _is_verb(caption: str, noun: Mention) -> bool:
    """Whether the word before speaks for a verb: "wait to cross", "they star"."""
    before = words(caption[: noun.start])
    return noun.entry.number == "one" and bool(before) and before[-1].text in _BEFORE_VERBS


def _replace_relation(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    # Relations of animate things, such as "holding", need to know what stands before.
    nouns = lexicon.mentions(caption, "nouns")
    for relation in lexicon.mentions(caption, "relations"):
        text = relation.entry.text
        if relation.entry.section == "animate" and not _follows_animate(relation, nouns):
            continue
        if text in ("over", "under") and re.match(r"\s*\d", caption[relation.end :]):
            passed["replace_relation: 'over 20' and the like is no place"] += 1
            continue
        if text == "with" and not _names_a_part(caption, relation):
            continue
        yield from _replace(caption, relation, "relations", lexicon, rng)


def _follows_animate(relation: Mention, nouns: list[Mention]) -> bool:
    """Whether the noun before can hold, watch or chase: a table cannot."""
    before = [noun for noun in nouns if noun.end <= relation.start]
    return bool(before) and before[-1].entry.section == "animate"


def _names_a_part(caption: str, relation: Mention) -> bool:
    """Whether this "with" may become "without". "There is a box with a ball" may have a box without
    one beside it.
    """
    if _EXISTS.search(caption):
        return False
    marked = f"{caption[: relation.end]}|{caption[relation.end :]}"
    return _WITH_A_PART.search(marked) is not None


def _replace(
    caption: str, mention: Mention, kind: str, lexicon: Lexicon, rng: random.Random
) -> Iterator[Negative]:
    choices = lexicon.others(mention.entry, kind)
    if not choices:
        return
    new = rng.choice(choices)
    text = edit(caption, [(mention.start, mention.end, new.text)])
    yield Negative(f"replace_{kind.rstrip('s')}", text, lexicon.alike(new, kind))


def _replace_number(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    counted, refused = counts(caption)
    passed.update(f"replace_number: {reason}" for reason in refused)
    for count in counted:
        value = rng.choice([n for n in NUMBERS.values() if n != count.value])
        # Another caption may give the number as a word or in digits.
        word = next(word for word, n in NUMBERS.items() if n == value)
        new_words = frozenset({str(value), word})
        yield Negative("replace_number", exchange(caption, [count], value), new_words)


# --- order ---


def _order(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    if len(words(caption)) < 4:
        passed["order: fewer than four words"] += 1
        return
    for name, text in shuffles(caption, rng).items():
        yield Negative(name, text)


def _swap_time(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    exchanged = events.exchanged(caption, lexicon, passed)
    if exchanged is not None:
        text, new_words = exchanged
        yield Negative("swap_time", text, new_words)


def _head(caption: str, attribute: Mention, lexicon: Lexicon) -> str | None:
    """The noun that an attribute is said of ("" after "is"); None where the word is no attribute
    here.
    """
    attributes = lexicon.entries["attributes"]
    phrase: list[str] = []
    place = attribute.end
    for word in words(caption[attribute.end :]):
        gap = caption[place : attribute.end + word.start].strip()
        is_joined = word.text in ("and", "or") or word.text in attributes
        is_boundary = word.text in FUNCTION_WORDS or word.text in _DETERMINERS
        if gap not in ("", ",") or (is_boundary and not is_joined) or len(phrase) == 4:
            break

        # Further attributes may come first, after a comma or "and"; once the noun has begun, they
        # belong to the next thing.
        if is_joined and phrase:
            break
        if not is_joined:
            if gap and phrase:
                break
            phrase.append(word.text)
        place = attribute.end + word.end
    return _fits(caption, attribute, phrase, lexicon)


def _fits(caption: str, attribute: Mention, phrase: list[str], lexicon: Lexicon) -> str | None:
    """The noun of a phrase where the attribute can be said of it, else None."""
    section = attribute.entry.section
    if not phrase:
        before = words(caption[: attribute.start])
        after_be = bool(before) and before[-1].text in _BE
        return "" if after_be and section != "people" else None

    nouns = lexicon.entries["nouns"]
    known = [word for word in phrase if word in nouns]
    lists = {entry.list for entry in chain.from_iterable(nouns[word] for word in known)}
    is_grown = "person" in lists or not _GROWN.isdisjoint(phrase)
    is_human = is_grown or "child" in lists or not _CHILDREN.isdisjoint(phrase)

    # "a tall man" but "a small child"; "a wooden table" but no wooden man.
    fits = {"people": is_grown, "things": not is_human, "anything": True}
    if not fits[section]:
        return None
    return known[0] if known else phrase[0]


RULES: dict[str, Callable[[str, Lexicon, random.Random, Counter[str]], Iterator[Negative]]] = {
    "swap_attribute": _swap_attribute,
    "swap_noun": _swap_noun,
    "replace_attribute": _replace_attribute,
    "replace_noun": _replace_noun,
    "replace_number": _replace_number,
    "replace_relation": _replace_relation,
    "order": _order,
    "swap_time": _swap_time,
}
