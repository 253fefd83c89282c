"""The nouns of WordNet that name their own first synset, from its database files.

CatLIP's rule (arXiv 2404.15653, and `wordnet_tagged_classification.py` of its release): a word is
a concept if WordNet has the synset "{word}.n.01" and that synset is called by the word. So "dog" is
one; "in", by which WordNet means inch.n.01, is none. The release tags parts of speech and does not
read the tags; nor are they here. Words are brought to the singular by WordNet's own rules
(morphy(7WN)).

The files are index.noun, data.noun and noun.exc, as wndb(5WN) describes them: the folder `dict` of
WordNet itself, /usr/share/wordnet of Debian's package wordnet-base, or nltk_data's
corpora/wordnet, unpacked or as the zip that nltk.download leaves. Offsets name synsets within one
version alone: 3.0 in all three.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlp.data_tools._english.words import each_word

FILES = ("index.noun", "data.noun", "noun.exc")
# Endings of a noun and what stands there in the singular (morphy(7WN)).
_DETACHED = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"),
)  # fmt: skip
_POSSESSIVE = ("'s", "’s")
_INSTALL = (
    "install it with `apt-get install wordnet-base` or `python -m nltk.downloader wordnet`, or "
    f"name a folder that holds {', '.join(FILES)} with --wordnet"
)


@dataclass(frozen=True)
class Nouns:
    """What captions are searched for; sent to every process."""

    synsets: dict[str, int]  # the synset's offset of each word that names its first one
    known: frozenset[str]  # all single words that WordNet has as nouns
    irregular: dict[str, tuple[str, ...]]  # forms that the endings do not explain
    lemmas: bool = True  # "cats" is looked up as "cat"

    def in_caption(self, caption: str) -> Iterator[str]:
        """The concepts that a caption names, by their words, in its order, repeated or not."""
        for token in each_word(caption):
            # The field's tokenizers take the possessive off.
            word = token.text.removesuffix(_POSSESSIVE[0]).removesuffix(_POSSESSIVE[1])
            word = self.lemma(word) if self.lemmas else word
            if word in self.synsets:
                yield word

    def lemma(self, word: str) -> str:
        """The shortest form of a word that WordNet has as a noun; the word, where it has none."""
        forms = self.irregular.get(word)
        if forms is None:
            stems = [
                word.removesuffix(ending) + singular
                for ending, singular in _DETACHED
                if word.endswith(ending)
            ]
            forms = tuple(stems)
        bases = [form for form in (word, *forms) if form in self.known]
        # Of "men", which is a word of its own, and "man" the one that is a concept.
        return min(bases, key=lambda form: (len(form), form not in self.synsets), default=word)

    def digest(self) -> str:
        """What the concepts of a caption depend on."""
        synsets = sorted(self.synsets.items())
        content = repr((synsets, sorted(self.known), sorted(self.irregular.items())))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read(place: str | None, lemmas: bool = True) -> Nouns:
    """The nouns of a folder or zip, or of the first usual place that has them; ValueError where
    there are none.
    """
    from vlp.data.stored import source

    places = usual_places() if place is None else [source(place)]
    folder = next((path for path in places if place is not None or path.exists()), None)
    if folder is None:
        raise ValueError(f"--wordnet is not given, and WordNet is in no usual place; {_INSTALL}")

    index, data, exceptions = (_text(folder, name).splitlines() for name in FILES)
    first_offsets = dict(map(_indexed, _entries(index, folder)))
    heads = dict(map(_head, _entries(data, folder)))
    synsets = {word: offset for word, offset in first_offsets.items() if heads.get(offset) == word}
    if not synsets:
        raise ValueError(f"{folder} holds no noun that names its first synset; {_INSTALL}")
    irregular = {form: tuple(bases) for form, *bases in map(str.split, exceptions) if bases}
    return Nouns(synsets, frozenset(first_offsets), irregular, lemmas)


def usual_places() -> list[Path]:
    """Where WordNet lies once it is installed by Debian or nltk."""
    named = os.environ.get("NLTK_DATA", "").split(os.pathsep)
    roots = [
        *filter(None, named),
        "~/nltk_data",
        "/usr/share/nltk_data",
        "/usr/local/share/nltk_data",
    ]
    of_nltk = [Path(root).expanduser() / "corpora" for root in roots]
    in_folders = [root / name for root in of_nltk for name in ("wordnet", "wordnet.zip")]
    return [*in_folders, Path("/usr/share/wordnet")]


def _text(place: Path, name: str) -> str:
    """A file of the folder or zip; ValueError where it is absent or no text."""
    try:
        if place.suffix == ".zip":
            with open(place, "rb") as file, zipfile.ZipFile(file) as archive:
                return archive.read(f"{place.stem}/{name}").decode()
        return (place / name).read_text(encoding="utf-8")
    except (OSError, KeyError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"--wordnet {place}: {name} cannot be read ({error}); {_INSTALL}"
        ) from None


def _entries(lines: list[str], place: Path) -> Iterator[list[str]]:
    """The fields of each line; the licence at the top, whose lines begin with blanks, left out."""
    entries = (line.split(" | ")[0].split() for line in lines if line[:1].strip())
    for fields in entries:
        if len(fields) < _FEWEST:
            raise ValueError(
                f"--wordnet {place}: found the line {' '.join(fields)[:60]!r}, expected WordNet's "
                f"database files (wndb(5WN)); {_INSTALL}"
            )
        yield fields


_FEWEST = 6  # fields of an entry of either file


def _indexed(fields: list[str]) -> tuple[str, int]:
    """word pos n_synsets n_pointers [pointer …] n_senses n_tagged offset …: word, first offset."""
    word, n_pointers = fields[0], int(fields[3])
    return word, int(fields[6 + n_pointers])


def _head(fields: list[str]) -> tuple[int, str]:
    """offset file type n_words word …: the offset, and the word that the synset is called by."""
    return int(fields[0]), fields[4].lower()
