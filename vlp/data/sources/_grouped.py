"""From the members of a tar, in the order of a stream, to samples, wherever in the tar they lie.

webdataset makes a sample of members that follow one another, so that a tar of all pictures and then
all texts gives it twice as many, none of them usable. Here a sample is handed on as soon as it has
a picture and a text. What is incomplete waits for the rest of it until its tar ends: of a tar whose
texts stand last, all pictures are in memory at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vlp import log
from vlp.data import loose_texts
from vlp.data.members import TEXT_TYPES, parse_name
from vlp.data.rows import said

_told: set[str] = set()  # addresses of tars with members that nobody reads

Sample = dict[str, Any]  # webdataset's: bytes by ending, beside __key__ and __url__


def samples(files: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """The samples of tars one after another, of webdataset's members with an empty one at each
    tar's end. ValueError for a member that is there twice.
    """
    of_tar = _Tar()
    for file in files:
        if file:
            yield from of_tar.take(file)
        else:
            yield from of_tar.rest()
            of_tar = _Tar()
    yield from of_tar.rest()


class _Tar:
    """The samples of one tar on their way."""

    def __init__(self) -> None:
        self.current: Sample | None = None
        self.waiting: dict[str, Sample] = {}
        self.handed_on: dict[str, set[str]] = {}  # the kinds of text of what was handed on, by key

    def take(self, file: dict[str, Any]) -> Iterator[Sample]:
        """One more member; gives the sample that it is the first behind, where that is complete."""
        from webdataset.tariterators import base_plus_ext

        key, ending = base_plus_ext(file["fname"])
        # What is hidden, or a system's, is no data.
        if key is None or parse_name(file["fname"]) is None:
            return

        if self.current is None or self.current["__key__"] != key:
            yield from self._close()
            self.current = self.waiting.pop(key, {"__key__": key, "__url__": file["__url__"]})

        ending = ending.lower()
        if ending in self.current:
            raise ValueError(f"{file['fname']}: duplicate file name in tar file")
        self.current[ending] = file["data"]

    def rest(self) -> Iterator[Sample]:
        """What the tar's end leaves, in the order in which it began; texts that are called
        otherwise than their picture are joined to it.
        """
        yield from self._close()
        self._join_loose_texts()
        self._tell_passed_over()
        yield from filter(_kinds, self.waiting.values())

    def _tell_passed_over(self) -> None:
        """Warn of members that no reader looks at."""
        passed_over: Counter[str] = Counter()
        url = ""
        for sample in self.waiting.values():
            if not _kinds(sample):
                url = sample["__url__"]
                passed_over.update(name for name in sample if name[:2] != "__")

        # Once a tar; every pass would tell it again.
        if passed_over and url not in _told:
            _told.add(url)
            log.warn(f"{url}: passed over: {said(passed_over)}")

    def _close(self) -> Iterator[Sample]:
        """Hand on the current sample, or let it wait."""
        sample, self.current = self.current, None
        if sample is None:
            return

        kinds = _kinds(sample)
        if "image" in kinds and kinds & TEXT_TYPES:
            self.handed_on[sample["__key__"]] = kinds & TEXT_TYPES
            yield sample
        else:
            self.waiting[sample["__key__"]] = sample

    def _join_loose_texts(self) -> None:
        pictures = dict(self.handed_on)
        texts = []
        for key, sample in self.waiting.items():
            if "image" in _kinds(sample):
                pictures[key] = set()
            else:
                texts += [(key, kind) for kind in sorted(TEXT_TYPES & sample.keys())]

        for (key, kind), owner in loose_texts.owners(pictures, texts).items():
            if owner.key in self.waiting:
                self.waiting[owner.key][kind] = self.waiting[key].pop(kind)


def _kinds(sample: Sample) -> set[str]:
    """The kinds of those of a sample's members that count."""
    names = [parse_name(f"{sample['__key__']}.{name}") for name in sample if name[:2] != "__"]
    return {name.kind for name in names if name is not None and name.kind}
