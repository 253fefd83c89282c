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
from itertools import pairwise

from vlp.data_tools._english.numbers import NUMBERS, counts, exchange
from vlp.data_tools._english.shuffles import FUNCTION_WORDS, shuffles
from vlp.data_tools._english.words import bare, edit, words
from vlp.data_tools.negatives.lexicon import Found, Lexicon

# characters of a caption that are changed: text towers read 77 tokens of it, the longest in use 248
HEAD = 1_200
_NEGATION = re.compile(
    r"\b(no|not|none|never|neither|nor|nothing|nobody|without|cannot|\w+n['’]t)\b", re.I
)
_PRONOUN = re.compile(
    r"\b(he|she|him|her|his|hers|himself|herself|men's|women's|man's|woman's)\b", re.I
)
# "a case with a lid", but neither "filled with" nor "with one leg in the air"
_WITH_A_PART = re.compile(
    r"\b(?!\w+(?:ed|ing|en)\b)(?!(?:all|busy|full|up|together|along|down|is|are|those|people)\b)\w+ with\|\s+"
    r"(?!(?:\d+|one|some|both|several|many|multiple|various|few|his|her|its|their|each|other|all|no|lots|a lot|"
    + "|".join(NUMBERS)
    + r")\b)",
    re.I,
)
_EXISTS = re.compile(r"\b(there (is|are)|one of)\b", re.I)
_DOUBLED = re.compile(r"\b(\w+)(?:,| and| or)* \1\b", re.I)  # "yellow and yellow", "box box"
_BE = {"is", "are", "was", "were"}
_DETERMINERS = {
    "a",
    "an",
    "the",
    "one",
    "some",
    "another",
    "other",
    "its",
    "their",
    "his",
    "her",
    "many",
    *NUMBERS,
}
_BEFORE_VERBS = {
    "to",
    "can",
    "could",
    "will",
    "would",
    "they",
    "we",
    "you",
    "people",
    "men",
    "women",
    "who",
    "that",
}
_GROWN = {"people", "person", "adult", "adults", "couple", "player", "players", "ladies"}
_CHILDREN = {"children", "child", "kid", "kids", "baby", "babies", "toddler"}
_JOINING = {"and", "or", "with"}  # "a red cup and a blue cup": exchanging the colors says the same
# between two nouns: words that say different things of the left and the right noun
_TAKES_PARTS = {
    "on", "in", "under", "above", "below", "over", "behind", "inside", "underneath", "beneath", "atop", "front", "holding",
    "chasing", "pulling", "carrying", "watching", "eating", "pushing", "feeding", "petting", "facing", "kissing", "hugging",
}  # fmt: skip
_EQUAL_PARTS = {
    "and",
    "or",
    "near",
    "beside",
    "next",
    "by",
    "of",
    "between",
    "with",
    "alongside",
    "around",
    "that",
    "which",
    "who",
}


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
    if _NEGATION.search(caption):
        passed["the caption says what is not there"] += 1
        kinds = tuple(kind for kind in kinds if kind == "order")
    proposed = [
        negative for kind in kinds for negative in RULES[kind](caption, lexicon, rng, passed)
    ]
    changed = [n for n in proposed if bare(n.text) != bare(caption)]
    return [n for n in changed if n.kind.startswith("order") or not _DOUBLED.search(n.text)]


# --- exchanging words within a caption -------------------------------------------------------------------------------


def _swap_attribute(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    found = [
        (f, head)
        for f in lexicon.find(caption, "attributes")
        if (head := _head(caption, f, lexicon)) is not None
    ]
    for i, (a, head_a) in enumerate(found):
        for b, head_b in found[i + 1 :]:
            if a.entry.list != b.entry.list or a.entry.cluster == b.entry.cluster:
                continue
            between = [w.text for w in words(caption[a.end : b.start])]
            alike = head_a == head_b and not _distinguishes(between, head_a, lexicon)
            if alike or _stands_alone(between, head_a):
                passed["swap_attribute: exchanged, the caption would say the same"] += 1
                continue
            yield Negative(
                "swap_attribute",
                edit(caption, [(a.start, a.end, b.entry.text), (b.start, b.end, a.entry.text)]),
            )


def _stands_alone(between: list[str], head: str) -> bool:
    """Whether both attributes belong to one noun: "red and yellow apple", "large wet dog"."""
    return head not in between and not set(between) & _BE


def _distinguishes(between: list[str], head: str, lexicon: Lexicon) -> bool:
    """Whether the words between two equal nouns tell them apart: "above" does, "and a large" does
    not.
    """
    rest = (
        set(between) - {head} - _DETERMINERS - _JOINING - _BE - set(lexicon.entries["attributes"])
    )
    return any(not word.isdigit() for word in rest)


def _swap_noun(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    found = [
        f
        for f in lexicon.find(caption, "nouns")
        if f.entry.section != "place" and _ends_its_phrase(caption, f)
    ]
    for a, b in pairwise(found):
        between = {w.text for w in words(caption[a.end : b.start])}
        if (
            a.entry.text == b.entry.text
            or a.entry.section != b.entry.section
            or a.entry.number != b.entry.number
        ):
            continue
        if between & _EQUAL_PARTS or not between & _TAKES_PARTS:
            passed["swap_noun: exchanged, the caption might still be true"] += 1
            continue
        yield Negative(
            "swap_noun",
            edit(caption, [(a.start, a.end, b.entry.text), (b.start, b.end, a.entry.text)]),
        )


def _ends_its_phrase(caption: str, noun: Found) -> bool:
    """Whether no further noun follows, as in "dog house"."""
    after = re.match(r"\s+([^\W\d_]+)", caption[noun.end :])
    return after is None or after[1].lower() in FUNCTION_WORDS or after[1].endswith("ing")


# --- replacing words by others of their list -------------------------------------------------------------------------


def _replace_attribute(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    for found in lexicon.find(caption, "attributes"):
        if _head(caption, found, lexicon) is not None:
            yield from _replace(caption, found, "attributes", lexicon, rng)


def _replace_noun(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    for found in lexicon.find(caption, "nouns"):
        if found.entry.list in ("person", "child") and _PRONOUN.search(caption):
            passed["replace_noun: a pronoun would no longer agree"] += 1
        elif found.entry.number != "any" and not _is_verb(
            caption, found
        ):  # "sheep" may stand for one or for many
            yield from _replace(caption, found, "nouns", lexicon, rng)


def _is_verb(caption: str, noun: Found) -> bool:
    """Whether the word before speaks for a verb: "wait to cross", "they star"."""
    before = words(caption[: noun.start])
    return noun.entry.number == "one" and bool(before) and before[-1].text in _BEFORE_VERBS


def _replace_relation(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    nouns = lexicon.find(caption, "nouns")
    for found in lexicon.find(caption, "relations"):
        before = [noun for noun in nouns if noun.end <= found.start]
        if found.entry.section == "animate" and not (
            before and before[-1].entry.section == "animate"
        ):
            continue
        if found.entry.text in ("over", "under") and re.match(r"\s*\d", caption[found.end :]):
            passed["replace_relation: 'over 20' and the like is no place"] += 1
            continue
        if found.entry.text == "with" and not _names_a_part(caption, found):
            continue
        yield from _replace(caption, found, "relations", lexicon, rng)


def _names_a_part(caption: str, found: Found) -> bool:
    """Whether this "with" may become "without". "There is a box with a ball" may have a box without
    one beside it.
    """
    return not _EXISTS.search(caption) and bool(
        _WITH_A_PART.search(caption[: found.end] + "|" + caption[found.end :])
    )


def _replace(
    caption: str, found: Found, kind: str, lexicon: Lexicon, rng: random.Random
) -> Iterator[Negative]:
    if choices := lexicon.others(found.entry, kind):
        new = rng.choice(choices)
        text = edit(caption, [(found.start, found.end, new.text)])
        yield Negative(f"replace_{kind.rstrip('s')}", text, lexicon.alike(new, kind))


def _replace_number(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    found, refused = counts(caption)
    passed.update(f"replace_number: {reason}" for reason in refused)
    for count in found:
        value = rng.choice([n for n in NUMBERS.values() if n != count.value])
        new = frozenset({str(value), next(word for word, n in NUMBERS.items() if n == value)})
        yield Negative("replace_number", exchange(caption, [count], value), new)


# --- order -----------------------------------------------------------------------------------------------------------


def _order(
    caption: str, lexicon: Lexicon, rng: random.Random, passed: Counter[str]
) -> Iterator[Negative]:
    if len(words(caption)) < 4:
        passed["order: fewer than four words"] += 1
        return
    for name, text in shuffles(caption, rng).items():
        yield Negative(name, text)


def _head(caption: str, attribute: Found, lexicon: Lexicon) -> str | None:
    """The noun that an attribute is said of ("" after "is"); None where the word is no attribute
    here.
    """
    phrase: list[str] = []
    place = attribute.end
    for word in words(caption[attribute.end :]):
        gap = caption[place : attribute.end + word.start].strip()
        joined = word.text in ("and", "or") or word.text in lexicon.entries["attributes"]
        if (
            gap not in ("", ",")
            or (word.text in FUNCTION_WORDS | _DETERMINERS and not joined)
            or len(phrase) == 4
        ):
            break
        if not joined:
            if gap and phrase:
                break
            phrase.append(word.text)
        elif phrase:
            break
        place = attribute.end + word.end
    return _fits(caption, attribute, phrase, lexicon)


def _fits(caption: str, attribute: Found, phrase: list[str], lexicon: Lexicon) -> str | None:
    if not phrase:
        before = words(caption[: attribute.start])
        return (
            ""
            if before and before[-1].text in _BE and attribute.entry.section != "people"
            else None
        )
    known = [(word, e) for word in phrase for e in lexicon.entries["nouns"].get(word, [])]
    lists = {e.list for _, e in known}
    grown = "person" in lists or not _GROWN.isdisjoint(phrase)
    human = grown or "child" in lists or not _CHILDREN.isdisjoint(phrase)
    if not {"people": grown, "things": not human, "anything": True}[attribute.entry.section]:
        return None
    return known[0][0] if known else phrase[0]


RULES: dict[str, Callable[[str, Lexicon, random.Random, Counter[str]], Iterator[Negative]]] = {
    "swap_attribute": _swap_attribute,
    "swap_noun": _swap_noun,
    "replace_attribute": _replace_attribute,
    "replace_noun": _replace_noun,
    "replace_number": _replace_number,
    "replace_relation": _replace_relation,
    "order": _order,
}
