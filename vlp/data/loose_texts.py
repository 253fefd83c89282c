"""Texts that are not called as their picture is, or lie elsewhere: which picture they belong to.

Where a picture has no text of a kind, it takes one that no other picture has:

    0.caption.txt, of 0.jpg                  the ending says what it is, no language or other name
    img_0.TXT, of IMG_0.JPG                  another case, or another composition of its letters
    texts/0.txt, of images/0.jpg             one folder of the path is another; as the trainers of
                                             detectors find labels, and data sets of captions lie

Nothing is guessed: a text that fits two pictures, or is one of two that fit a picture, is of none,
and counts as left out. Folders are paired only where the one holds no picture with a text, the
other no picture and texts of no third folder, and most pictures find a text: one whose picture was
lost is not given away, nor do notes make pairs of a tree of classes. Folders of licences and the
like are not paired at all.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import chain
from typing import NamedTuple

Text = tuple[str, str]  # key and kind of a text, which lies there without a picture
_ENDINGS = (".caption", ".captions", ".text", ".txt")
# Folders whose texts say something else of the pictures.
_OTHER_FOLDERS = frozenset({
    "license", "licenses", "licence", "licences", "copyright", "credits", "url", "urls", "exif",
    "ocr", "boxes", "bbox", "bboxes", "landmarks", "keypoints",
})  # fmt: skip

# As `Shard.left_out` and tools count them.
BY_ENDING = "texts whose name ends in what they are (0.caption.txt of 0.jpg): read"
BY_CASE = "texts named in another case than their image: read"
BY_FOLDER = "texts in another folder than their image (texts/0.txt of images/0.jpg): read"


class Owner(NamedTuple):
    """The picture that a text belongs to."""

    key: str
    how: str  # it was found: BY_ENDING, BY_CASE or BY_FOLDER


def owners(pictures: Mapping[str, Set[str]], texts: Iterable[Text]) -> dict[Text, Owner]:
    """The pictures of those texts that have one. `pictures`: the kinds of text that each has, by
    key.
    """
    rest = list(texts)
    taken = {(key, kind) for key, kinds in pictures.items() for kind in kinds}
    owned: dict[Text, Owner] = {}
    for how, candidates_of in _LEVELS:
        if not rest:
            break
        candidates = candidates_of(pictures)

        claims: dict[Text, list[str]] = defaultdict(list)
        for key, kind in rest:
            free = [picture for picture in candidates(key) if (picture, kind) not in taken]
            if len(free) == 1:
                claims[free[0], kind].append(key)

        single = {place: keys[0] for place, keys in claims.items() if len(keys) == 1}
        if how == BY_FOLDER:
            single = _of_one_folder(single)
            if not _is_of_most(single, pictures):
                break
        for (picture, kind), key in single.items():
            owned[key, kind] = Owner(picture, how)
            taken.add((picture, kind))
        rest = [text for text in rest if text not in owned]
    return owned


def _of_one_folder(single: Mapping[Text, str]) -> dict[Text, str]:
    """Those whose text lies in a folder that has the texts of one folder of pictures only."""
    # The folders of classes would all find theirs in one folder of notes.
    picture_folders: dict[str, set[str]] = defaultdict(set)
    for (picture, _), text in single.items():
        picture_folders[_folder(text)].add(_folder(picture))
    return {
        place: text for place, text in single.items() if len(picture_folders[_folder(text)]) == 1
    }


def _is_of_most(single: Mapping[Text, str], pictures: Mapping[str, Set[str]]) -> bool:
    """Whether at least half of the pictures without a text beside them have found one."""
    n_found = len({picture for picture, _ in single})
    n_without = sum(not kinds for kinds in pictures.values())
    return 2 * n_found >= n_without


def may_own(picture: str, text: str) -> bool:
    """Whether a text with this key could belong to the picture of the key `picture`."""
    one = {picture: frozenset[str]()}
    return any(candidates_of(one)(text) for _, candidates_of in _LEVELS)


def _by_ending(pictures: Mapping[str, Set[str]]) -> Callable[[str], Iterable[str]]:
    def candidates(text: str) -> Iterator[str]:
        for ending in _ENDINGS:
            if text.lower().endswith(ending) and text[: -len(ending)] in pictures:
                yield text[: -len(ending)]

    return candidates


def _by_case(pictures: Mapping[str, Set[str]]) -> Callable[[str], Iterable[str]]:
    by_folded = defaultdict(list)
    for picture in pictures:
        by_folded[_folded(picture)].append(picture)
    return lambda text: by_folded.get(_folded(text), ())


def _by_folder(pictures: Mapping[str, Set[str]]) -> Callable[[str], Iterable[str]]:
    # A name of which one folder may be any other: found at once among a million.
    folders = {_folder(picture) for picture in pictures}
    with_texts = {_folder(picture) for picture, kinds in pictures.items() if kinds}
    # More than two of a name tell no more than two: a text that fits both is of none.
    by_open_name: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
    for picture in pictures:
        for name in _open_names(picture):
            if len(by_open_name[name]) < 2:
                by_open_name[name].append(picture)

    def candidates(text: str) -> Iterable[str]:
        parts = _folder(text).casefold().split("/")
        if _folder(text) in folders or not _OTHER_FOLDERS.isdisjoint(parts):
            return ()
        # A picture that has a text makes the choice between it and another no clearer.
        names = _open_names(text)
        fitting = list(chain.from_iterable(by_open_name.get(name, ()) for name in names))
        is_certain = len(fitting) == 1 and _folder(fitting[0]) not in with_texts
        return fitting if is_certain else ()

    return candidates


_LEVELS = ((BY_ENDING, _by_ending), (BY_CASE, _by_case), (BY_FOLDER, _by_folder))


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


def _folded(key: str) -> str:
    return unicodedata.normalize("NFC", key).casefold()


def _open_names(key: str) -> Iterator[tuple[str | None, ...]]:
    """The name with each of its folders left open in turn."""
    parts = _folded(key).split("/")
    for i in range(len(parts) - 1):
        yield (*parts[:i], None, *parts[i + 1 :])
