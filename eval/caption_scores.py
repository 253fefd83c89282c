"""CIDEr-D and BLEU of captions against references, by the code of COCO's caption evaluation
(pycocoevalcap); here are the words that it counts.

`plain` splits texts into words by itself; `ptb` runs the Java tokenizer of that package, as COCO's
server does. Both write everything small and leave punctuation out.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from typing import Literal, NamedTuple

Tokenizer = Literal["plain", "ptb"]


class Scores(NamedTuple):
    """Of candidates against their references."""

    cider: list[float]  # of each candidate, in 0…10; the corpus's is their mean
    bleu: list[float]  # BLEU-1 to BLEU-4 of the corpus, in 0…1


def check_installed(tokenizer: Tokenizer) -> None:
    """Raise ValueError where what scores captions is not here."""
    try:
        import pycocoevalcap.cider.cider  # noqa: F401  # whether it is there
    except ImportError as error:
        raise ValueError(
            f"captions are scored by the package pycocoevalcap, which does not import ({error}); "
            "install it with pip install 'vlp[caption]'"
        ) from None
    if tokenizer == "ptb" and shutil.which("java") is None:
        raise ValueError(
            "tokenizer: ptb runs Java, and there is no `java` on the PATH; install a Java runtime "
            "(apt-get install default-jre-headless), or take tokenizer: plain"
        )


def score(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: Tokenizer
) -> Scores:
    """Scores of one candidate a picture against all its references, at least one each.

    CIDEr weighs an n-gram by how few pictures' references hold it, so that of one picture alone
    every score would be 0.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    found = _split([[text] for text in candidates], tokenizer)
    expected = _split(references, tokenizer)
    _, cider = Cider().compute_score(expected, found)
    bleu, _ = Bleu(4).compute_score(expected, found, verbose=0)

    # Without a reference of two words it divides zero by zero.
    finite = [value if math.isfinite(value) else 0.0 for value in map(float, cider)]
    return Scores(finite, [float(value) for value in bleu])


def _split(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> dict[int, list[str]]:
    """The texts of each picture, by its number, as words with one space between them."""
    if tokenizer == "plain":
        return {
            i: [" ".join(plain_words(text)) for text in of_one] for i, of_one in enumerate(texts)
        }

    return _split_by_java(texts)


def _split_by_java(texts: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """The same by COCO's Java tokenizer; ValueError where that fails."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It sends a text a line, by a file in the folder of the package.
    lines = {
        i: [{"caption": " ".join(text.split())} for text in of_one]
        for i, of_one in enumerate(texts)
    }
    try:
        words = PTBTokenizer().tokenize(lines)
    except OSError as error:
        raise ValueError(f"tokenizer: ptb cannot run ({error}); take tokenizer: plain") from error

    # Of a Java that fails it takes no notice.
    n_expected = [len(of_one) for of_one in lines.values()]
    n_returned = [len(words.get(i, ())) for i in lines]
    if n_returned != n_expected:
        raise ValueError(
            f"tokenizer: ptb gave words of {sum(n_returned)} of {sum(n_expected)} texts; look at "
            "what Java said above, or take tokenizer: plain"
        )
    return words


# A word may hold hyphens, points and the like, but not end with one, unless it is letters with
# points (u.s.). n't and 's are words of their own, as in the Penn treebank.
_WORD = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|(?:[a-z]\.){2,}"
    r"|[^\W_]+(?:[-.,:'/&_@][^\W_]+)*|[$%#&]|[()\[\]{}]"
)
_CONTRACTED = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")
# COCO's list of punctuation has brackets in capitals, and its words are small: they stay.
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip


def plain_words(text: str) -> list[str]:
    """The words of a text in small letters, contractions apart, without punctuation."""
    small = text.lower().replace("’", "'")
    words = _WORD.findall(_CONTRACTED.sub(r" \1", small))
    return [_BRACKETS.get(word, word) for word in words]
