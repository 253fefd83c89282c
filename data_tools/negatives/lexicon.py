"""Word lists: which words exclude one another (words.yaml or a user's file of the same form)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
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
class Mention:
    """An entry in a caption, and where it stands."""

    start: int
    end: int
    entry: Entry


class Lexicon:
    """All entries, by kind ("attributes", "nouns", "relations")."""

    def __init__(self, tree: Any, name: str) -> None:
        """Read the mapping of a word file; raises ValueError for unknown sections and empty or too
        short lists.
        """
        unknown = set(tree) - {*SECTIONS, "protected"} if isinstance(tree, dict) else {"no mapping"}
        if unknown:
            raise ValueError(
                f"{name}: found {', '.join(map(str, unknown))}; "
                f"expected {', '.join(SECTIONS)}, protected"
            )

        self.entries: dict[str, dict[str, list[Entry]]] = {}
        for kind, sections in SECTIONS.items():
            self.entries[kind] = _read_kind(tree.get(kind), kind, sections, name)
        self._patterns = {kind: _pattern(entries) for kind, entries in self.entries.items()}

        # By list as well: rules exchange an entry for another of its list.
        self._lists: dict[tuple[str, str, str], list[Entry]] = {}
        for kind, entries_of in self.entries.items():
            for entry in itertools.chain.from_iterable(entries_of.values()):
                self._lists.setdefault((kind, entry.section, entry.list), []).append(entry)

        # Phrases such as "hot dog" are left alone, in the plural too.
        protected: dict[str, None] = {}
        for phrase in map(str, tree.get("protected") or []):
            protected |= {phrase: None, plural(phrase): None}
        self._protected = _pattern(protected) if protected else None

    @classmethod
    def load(cls, name: str | Path | None = None) -> Lexicon:
        """The lists of a YAML file; None: those that come with the tool; "scenes": those of the
        generated scenes.
        """
        import yaml

        # Other words than those of its captions would give a negative of scenes away.
        shipped = {None: "words.yaml", "scenes": "words_scenes.yaml"}
        if name is None or name == "scenes":
            path = Path(__file__).with_name(shipped[name])
        else:
            path = Path(name)

        try:
            return cls(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None

    def mentions(self, caption: str, kind: str) -> list[Mention]:
        """The entries of a kind in a caption, in order, outside protected phrases; one word may be
        in several lists.
        """
        closed = [m.span() for m in self._protected.finditer(caption)] if self._protected else []

        mentions = []
        for match in self._patterns[kind].finditer(caption):
            start, end = match.span()
            if any(first < end and start < last for first, last in closed):
                continue
            entries = self.entries[kind][match[0].lower()]
            mentions += [Mention(start, end, entry) for entry in entries]
        return mentions

    def others(self, entry: Entry, kind: str) -> list[Entry]:
        """What may replace `entry`: words of its list that are not alike, in the same number."""
        return [
            other
            for other in self._lists[kind, entry.section, entry.list]
            if other.cluster != entry.cluster
            and other.first
            and other.number in (entry.number, "any")
        ]

    def alike(self, entry: Entry, kind: str) -> frozenset[str]:
        """The words of an entry's cluster, in all numbers: what another caption must not say of the
        same picture.
        """
        return frozenset(
            other.text
            for other in self._lists[kind, entry.section, entry.list]
            if other.cluster == entry.cluster
        )


def _read_kind(
    tree: Any, kind: str, sections: tuple[str, ...], name: str
) -> dict[str, list[Entry]]:
    """The entries of one kind, by word; raises ValueError for a tree of another form."""
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"{name}: {kind} has no lists; expected {', '.join(sections)}, each with lists of words"
        )

    result: dict[str, list[Entry]] = {}
    for section, lists in tree.items():
        if section not in sections or not isinstance(lists, dict):
            raise ValueError(
                f"{name}: {kind}.{section} is not one of {', '.join(sections)} "
                "with named lists below it"
            )
        for list_name, clusters in lists.items():
            # One word alone has nothing to be exchanged for.
            if not isinstance(clusters, list) or len(clusters) < 2:
                raise ValueError(
                    f"{name}: the word list {kind}.{section}.{list_name} is {clusters!r}; "
                    "expected at least two words"
                )
            for entry in _read_list(clusters, kind, list=list_name, section=section):
                result.setdefault(entry.text, []).append(entry)
    return result


def _read_list(clusters: list[Any], kind: str, **place: Any) -> Iterator[Entry]:
    for number, cluster in enumerate(clusters):
        for rank, word in enumerate(str(cluster).lower().split("|")):
            yield from _entries(word.strip(), kind, cluster=number, first=not rank, **place)


def _entries(word: str, kind: str, **place: Any) -> list[Entry]:
    if kind != "nouns":
        return [Entry(word, **place)]

    if plural(word) == word:
        return [Entry(word, number="any", **place)]

    return [Entry(word, number="one", **place), Entry(plural(word), number="many", **place)]


def _pattern(texts: dict[str, Any]) -> re.Pattern[str]:
    """The longest of `texts` at each place, as whole words; a hyphen joins words."""
    # The longest first: an alternation takes the first that fits.
    longest_first = sorted(texts, key=len, reverse=True)
    alternatives = "|".join(re.escape(text) for text in longest_first)
    return re.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])", re.IGNORECASE)
