"""Word lists: which words exclude one another (words.yaml or a user's file of the same form)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp.data_tools._english.words import plural

SECTIONS = {
    "attributes": ("anything", "people", "things"),
    "nouns": ("animate", "thing", "place"),
    "relations": ("anything", "animate"),
}


@dataclass(frozen=True)
class Entry:
    """One word or phrase of a list."""

    text: str
    list: str  # the list's name, such as "color"
    section: str  # anything, people, things, animate, thing, place
    cluster: int  # entries of one cluster (joined by |) are never exchanged
    number: str = ""  # of nouns: "one", "many", or "any" for sheep
    first: bool = True  # of its cluster: the word that is put in


@dataclass(frozen=True)
class Found:
    """An entry in a caption."""

    start: int
    end: int
    entry: Entry


class Lexicon:
    """All entries, by kind ("attributes", "nouns", "relations")."""

    def __init__(self, tree: Any, name: str) -> None:
        """Read the mapping of a word file; raises ValueError for unknown sections and empty or too
        short lists.
        """
        self.entries: dict[str, dict[str, list[Entry]]] = {}
        unknown = set(tree) - {*SECTIONS, "protected"} if isinstance(tree, dict) else {"no mapping"}
        if unknown:
            raise ValueError(
                f"{name}: found {', '.join(map(str, unknown))}; expected {', '.join(SECTIONS)}, protected"
            )
        for kind, sections in SECTIONS.items():
            self.entries[kind] = _read_kind(tree.get(kind), kind, sections, name)
        self._patterns = {kind: _pattern(found) for kind, found in self.entries.items()}
        self._lists: dict[tuple[str, str, str], list[Entry]] = {}
        for kind, found in self.entries.items():
            for entry in (e for entries in found.values() for e in entries):
                self._lists.setdefault((kind, entry.section, entry.list), []).append(entry)
        protected = tree.get("protected") or []
        self._protected = (
            _pattern(dict.fromkeys(w for p in protected for w in (str(p), plural(str(p)))))
            if protected
            else None
        )

    @classmethod
    def load(cls, name: str | Path | None = None) -> Lexicon:
        """The lists of a YAML file; None: those that come with the tool; "scenes": those of the
        generated scenes.
        """
        import yaml

        shipped = {None: "words.yaml", "scenes": "words_scenes.yaml"}
        if name is None or name == "scenes":
            path = Path(__file__).with_name(shipped[name])
        else:
            path = Path(name)
        try:
            return cls(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None

    def find(self, caption: str, kind: str) -> list[Found]:
        """The entries of a kind in a caption, in order, outside protected phrases; one word may be
        in several lists.
        """
        closed = [m.span() for m in self._protected.finditer(caption)] if self._protected else []
        return [
            Found(m.start(), m.end(), entry)
            for m in self._patterns[kind].finditer(caption)
            if not any(a < m.end() and m.start() < b for a, b in closed)
            for entry in self.entries[kind][m[0].lower()]
        ]

    def others(self, entry: Entry, kind: str) -> list[Entry]:
        """What may replace `entry`: words of its list that are not alike, in the same number."""
        return [
            e
            for e in self._lists[kind, entry.section, entry.list]
            if e.cluster != entry.cluster and e.first and e.number in (entry.number, "any")
        ]

    def alike(self, entry: Entry, kind: str) -> frozenset[str]:
        """The words of an entry's cluster, in all numbers: what another caption must not say of the
        same picture.
        """
        return frozenset(
            e.text
            for e in self._lists[kind, entry.section, entry.list]
            if e.cluster == entry.cluster
        )


def _read_kind(
    tree: Any, kind: str, sections: tuple[str, ...], name: str
) -> dict[str, list[Entry]]:
    result: dict[str, list[Entry]] = {}
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"{name}: {kind} has no lists; expected {', '.join(sections)}, each with lists of words"
        )
    for section, lists in tree.items():
        if section not in sections or not isinstance(lists, dict):
            raise ValueError(
                f"{name}: {kind}.{section} is not one of {', '.join(sections)} with named lists below it"
            )
        for list_name, clusters in lists.items():
            if not isinstance(clusters, list) or len(clusters) < 2:
                raise ValueError(
                    f"{name}: the word list {kind}.{section}.{list_name} is {clusters!r}; expected at least two words"
                )
            for i, cluster in enumerate(clusters):
                for rank, word in enumerate(str(cluster).lower().split("|")):
                    for entry in _entries(
                        word.strip(),
                        kind,
                        list=list_name,
                        section=section,
                        cluster=i,
                        first=not rank,
                    ):
                        result.setdefault(entry.text, []).append(entry)
    return result


def _entries(word: str, kind: str, **place: Any) -> list[Entry]:
    if kind != "nouns":
        return [Entry(word, **place)]
    if plural(word) == word:
        return [Entry(word, number="any", **place)]
    return [Entry(word, number="one", **place), Entry(plural(word), number="many", **place)]


def _pattern(texts: dict[str, Any]) -> re.Pattern[str]:
    """The longest of `texts` at each place, as whole words; a hyphen joins words."""
    alternatives = "|".join(
        re.escape(text).replace(r"\\ ", r"\\s+") for text in sorted(texts, key=len, reverse=True)
    )
    return re.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])", re.IGNORECASE)
