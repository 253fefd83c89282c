"""Which texts of a tree of files belong to which picture."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, defaultdict
from itertools import chain

from vlp.data import loose_texts
from vlp.data.archives import Archive, extension_of


def texts_beside(archive: Archive) -> dict[str, dict[str, str]]:
    """{picture: {kind: text}} of the pictures that have any: `a.txt` or `a.jpg.txt` beside
    `a.jpg`."""
    # Composed Unicode throughout: a tar made on a Mac spells its names decomposed.
    by_stem: dict[str, dict[str, str]] = defaultdict(dict)
    by_image_name: dict[str, dict[str, str]] = defaultdict(dict)
    for name in archive.texts:
        kind = extension_of(name)
        by_stem[stem_of(name)].setdefault(kind, name)
        by_image_name[_plain_extension(stem_of(name))].setdefault(kind, name)

    stems = {_plain_extension(stem_of(name)) for name in archive.names}
    beside: dict[str, dict[str, str]] = {}
    for name in archive.names:
        image_name = _plain_extension(unicodedata.normalize("NFC", name))
        # Of `a.jpg` and `a.jpg.png`, the second one has the text `a.jpg.txt`.
        by_name = {} if image_name in stems else by_image_name.get(image_name, {})
        texts = by_name | by_stem.get(stem_of(name), {})
        if texts:
            beside[name] = texts
    return beside


def with_loose_texts(
    archive: Archive, beside: dict[str, dict[str, str]]
) -> tuple[dict[str, dict[str, str]], Counter[str]]:
    """The same with the texts that `vlp.data.loose_texts` finds a picture for; and how many were
    found in which way.
    """
    names = {stem_of(name): name for name in reversed(archive.names)}
    kinds = {key: beside.get(name, {}).keys() for key, name in names.items()}
    used = set(chain.from_iterable(texts.values() for texts in beside.values()))
    unused: dict[loose_texts.Text, str] = {}
    for name in sorted(archive.texts.keys() - used):
        unused.setdefault((stem_of(name), extension_of(name)), name)

    owners = loose_texts.owners(kinds, unused)
    joined = {name: dict(texts) for name, texts in beside.items()}
    for (key, kind), owner in owners.items():
        joined.setdefault(names[owner.key], {})[kind] = unused[key, kind]
    return joined, Counter(owner.how for owner in owners.values())


def _plain_extension(name: str) -> str:
    """The name with its last extension in lower case."""
    stem, extension = os.path.splitext(name)
    return stem + extension.lower()


def stem_of(name: str) -> str:
    """A name without its extension, in composed Unicode."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])
