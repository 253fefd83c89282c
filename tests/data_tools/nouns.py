"""A WordNet of a dozen nouns, as its database files."""

from __future__ import annotations

from pathlib import Path

# Words of each synset, the one that it is called by first; a word's first synset is that of the
# first line with it, unless SENSES says otherwise.
SYNSETS = [
    ["dog", "domestic_dog"], ["cat"], ["inch", "in"], ["wolf"], ["bus", "autobus"], ["glass"],
    ["woman"], ["child", "kid"], ["church"], ["box"], ["pony"], ["man"], ["workforce", "men"],
    ["spectacles", "glasses"], ["leaf"], ["T-shirt", "t-shirt"], ["kid"], ["axis"], ["ax", "axe"],
]  # fmt: skip
IRREGULAR = ["wolves wolf", "children child", "leaves leaf leave", "axes ax axis"]
LICENCE = "  1 This software and database is being provided to you, the LICENSEE  \n" * 3


def write_wordnet(folder: Path) -> Path:
    """The three files for these synsets, as wndb(5WN) describes them."""
    folder.mkdir(parents=True)
    entries: dict[str, list[int]] = {}
    data = LICENCE
    for words in SYNSETS:
        offset = len(data)
        for word in words:
            entries.setdefault(word.lower(), []).append(offset)
        named = " ".join(f"{word} 0" for word in words)
        data += f"{offset:08d} 05 n {len(words):02x} {named} 001 @ 00001740 n 0000 | a | gloss  \n"

    index = LICENCE
    for word, offsets in sorted(entries.items()):
        n = len(offsets)
        places = " ".join(f"{offset:08d}" for offset in offsets)
        index += f"{word} n {n} 2 @ ~ {n} 0 {places}  \n"
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text(index)
    (folder / "noun.exc").write_text("\n".join(IRREGULAR))
    return folder
