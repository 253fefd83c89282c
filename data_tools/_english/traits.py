"""What a caption is like, by rules and small word lists: language, complexity, action. Pure
functions, all of them rough.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection
from functools import cache
from itertools import pairwise

from vlp.data_tools._english.words import plural, words

# The commonest words of languages in Latin letters; those that languages share are in none or in
# several.
_STOP_WORDS = {
    "en": "the of and a in to is on with an at it are for by this that from his her two their "
          "standing sitting next near",
    "de": "der die das und ist ein eine einen einem einer mit auf im von zu den dem nicht sich "
          "auch für zwei neben vor am steht",
    "fr": "le la les des et est un une dans du en sur avec au qui pour pas deux il elle sont ce "
          "cette à aux près devant",
    "es": "el la los las de y es un una en con del que por para se al dos su está junto sobre no "
          "como hay unos",
    "it": "il lo la gli le di e è un una uno in con del della che per si al due su sono nel nella "
          "dei delle accanto",
    "pt": "o os as de e é um uma em com do da que por para se ao dois duas no na dos das está não "
          "uns",
    "nl": "de het een en van in is op met dat die te niet aan voor er zijn door twee naast naar "
          "bij ook om staat",
    "sv": "och en ett i på är som med av för den det att till inte från två vid står sitter har",
    "pl": "i w na z jest się do nie to że o dla od przez dwa dwie oraz są przy który",
    "tr": "bir ve bu ile için da de olan iki üzerinde çok var gibi daha yanında kadar duran",
    "vi": "một của và là có trong những với người các đang trên cho không hai được đứng này",
    "id": "yang dan di dengan sebuah untuk dari ini itu pada dua adalah ke seorang atas sedang "
          "berdiri",
}  # fmt: skip
_LANGUAGES_OF: dict[str, list[str]] = {}
for _language, _list in _STOP_WORDS.items():
    for _word in set(_list.split()):
        _LANGUAGES_OF.setdefault(_word, []).append(_language)
# Scripts, by the first word of a letter's Unicode name, that tell the language or the best guess at
# it.
_SCRIPTS = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "CYRILLIC": "ru",
    "GREEK": "el",
    "ARABIC": "ar",
    "HEBREW": "he",
    "DEVANAGARI": "hi",
    "BENGALI": "bn",
    "TAMIL": "ta",
    "TELUGU": "te",
    "THAI": "th",
    "GEORGIAN": "ka",
    "ARMENIAN": "hy",
}
UNCLEAR = "unclear"  # too few or contradictory words in Latin letters
LANGUAGES = (*_STOP_WORDS, *dict.fromkeys(_SCRIPTS.values()), UNCLEAR)

_RELATIONS = frozenset(
    """
    on in at with under above below over behind inside underneath beneath atop near beside by
    between among across along around through against onto into from toward towards outside beyond
    holding wearing carrying next front top left right of
""".split()
)
_VERBS = """
walk run sit stand hold ride play eat look watch jump fly drive read write talk speak smile laugh
cry sleep cut wash clean throw catch kick hit swing surf ski swim climb dance sing carry wear pull
push lean hang wait pose feed pet graze chase bark fight build paint sell buy open close pour serve
prepare make take give use try get go come leave enter travel move turn stop float sail perform
celebrate kiss hug hike dig pick reach follow lead brush
""".split()
_IRREGULAR = """
ran sat stood lay lain held rode ridden ate eaten drank drunk flew flown drove driven wrote written
spoke slept threw thrown caught swung swam swum sang sung wore worn hung fought built drew drawn
sold bought made took taken gave given got went gone came left led lying lies parked crossed skated
planted cooked waved drawn pointed landed worked rested
""".split()
_NOUNS_IN_ING = frozenset(
    """
    building ceiling wedding painting king ring thing evening morning string spring wing clothing
    railing awning dining living during something anything nothing everything icing stuffing
    frosting topping dressing siding paving housing parking rigging sling swing drawing bedding
    lighting flooring wiring fencing seasoning pudding earring sibling
""".split()
)


def language(caption: str) -> str:
    """A language's two letters by script, then by stop words, or UNCLEAR.

    Rough: one language stands for a script that several share (ru for all Cyrillic, ar for Persian
    too), and a caption in Latin letters without stop words, such as a name, is UNCLEAR.
    """
    script = script_of(caption)
    if script != "LATIN":
        return _SCRIPTS.get(script, UNCLEAR)

    # A tie tells nothing: Spanish and Portuguese, say, share many words.
    best = _votes(caption).most_common(2)
    is_tie = len(best) == 2 and best[0][1] == best[1][1]
    return UNCLEAR if not best or is_tie else best[0][0]


def is_in(caption: str, languages: Collection[str]) -> bool | None:
    """Whether a caption is in one of these languages; None where that cannot be told.

    In Latin letters it takes two more stop words of another language than of all these to say no:
    one alone may belong to a name ("Die Hard", "El Paso"). Without letters nothing can be told, and
    Chinese characters alone may be Japanese.
    """
    script = script_of(caption)
    if language(caption) in languages:
        return True
    if script == "":
        return None
    if script == "CJK" and "ja" in languages:
        return None
    if script != "LATIN":
        return False

    # No stop words, no votes: such a language has a script of its own.
    wanted = [name for name in languages if name in _STOP_WORDS]
    if not wanted:
        return False
    votes = _votes(caption)
    most_wanted = max(votes[name] for name in wanted)
    most = max(votes.values(), default=0)
    return False if most >= most_wanted + 2 else None


def script_of(caption: str) -> str:
    """The script of most letters by Unicode's name (LATIN, CJK, …), HIRAGANA for all Japanese; ""
    without letters.
    """
    # Letters in bold, in circles, of full width are letters of their script.
    if not caption.isascii():
        caption = unicodedata.normalize("NFKC", caption)

    scripts = Counter(_script(letter) for letter in caption if letter.isalpha())
    if scripts["HIRAGANA"] + scripts["KATAKANA"]:
        return "HIRAGANA"  # kana stand among Chinese characters
    return max(scripts, key=lambda name: scripts[name], default="")


def _votes(caption: str) -> Counter[str]:
    """How many of a caption's words are stop words of each language."""
    votes: Counter[str] = Counter()
    for word in words(caption):
        votes.update(_LANGUAGES_OF.get(word.text, ()))
    return votes


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


def complexity(caption: str) -> int:
    """How many relations join the things of an English caption: prepositions and verbs between
    other words.

    A stand-in for the edges of the parse graph in DiHT (arXiv 2301.02280, section 3.1): "a photo"
    has 0, "a dog on a sofa" 1. "in front of", "on top of" and the like are one.
    """
    texts = [word.text for word in words(caption)]
    n_relations, in_relation = 0, False
    for i, text in enumerate(texts):
        # At either end a word joins nothing.
        is_inside = 0 < i < len(texts) - 1
        is_relation = is_inside and (text in _RELATIONS or is_action(text, texts[i - 1]))
        if is_relation and not in_relation:
            n_relations += 1
        in_relation = is_relation
    return n_relations


def has_action(caption: str) -> bool:
    """Whether an English caption says that something happens: a verb of a list of 110, or a word
    that ends like one.
    """
    texts = ["", *(word.text for word in words(caption))]
    return any(is_action(word, before) for before, word in pairwise(texts))


def is_action(word: str, before: str) -> bool:
    """Whether a word after the word `before` is a verb in use: "runs", "running", "is parked", but
    neither "a run" nor "king".
    """
    if before in ("a", "an", "the", "of"):
        return False
    if word in _INFLECTED:
        return True
    return len(word) > 5 and word.endswith("ing") and word not in _NOUNS_IN_ING


def _inflected(verb: str) -> set[str]:
    """-s, -ing and -ed of a regular verb; the last letter of "run" is doubled."""
    if re.search(r"[^aeiou]y$", verb):
        return {plural(verb), verb + "ing", verb[:-1] + "ied"}
    doubled = re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb)
    stem = verb + verb[-1] if doubled else verb.removesuffix("e")
    return {plural(verb), stem + "ing", stem + "ed"}


_INFLECTED = frozenset(_IRREGULAR).union(*map(_inflected, _VERBS))
