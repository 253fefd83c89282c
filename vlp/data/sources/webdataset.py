"""A webdataset stream: `{name: webdataset, urls: "pipe:aws s3 cp s3://b/{000..199}.tar -", samples:
1000000}`.

Either `urls`, opened as webdataset opens them, or `pipeline: package.module:function`, your own:

    def function(part: int, parts: int) -> Iterable[dict]:  # samples before any decoding
        shards = wds.SimpleShardList(URLS[part::parts])
        return wds.DataPipeline(shards, wds.tarfile_to_samples(), wds.select(good))

Members stay bytes: webdataset's own decoder, which runs pickles, is never used. Prefer the sources
`shards` and `remote` wherever the data are plain shards. A stream has no random access, so here

- a pass is `samples` long and in the stream's own order, the same in every pass; a part that ends
  sooner starts again;
- resuming is exact if the stream gives the same samples in the same order again, and takes the time
  to read up to there;
- `parts` streams give `run` samples each in turn. Every loader process reads the parts that its
  rows come from: with parts = ranks × workers and run = train.batch / ranks exactly one each. Other
  ranks and workers change no batch, but read parts more than once;
- a sample is known by its number in the pass; its key is webdataset's `__key__`, where there is
  one;
- members of a sample may lie anywhere in their tar (`_grouped`); best they follow one another,
  which needs no memory;
- a damaged tar (cut short, or with a member twice) ends the run after some tries: it looks like a
  connection that broke, and to skip what a broken connection held would change the order. Leave the
  tar out of `urls`, or skip the damage in a pipeline of your own with
  `wds.tarfile_to_samples(handler=wds.warn_and_continue)`;
- local tars of ours (with `urls`) are compared with the digests that they were written with; what
  is lost of them is told once a tar;
- bad samples, here also those without a text, are replaced by some of the first `RESERVE` of the
  pass, which every process keeps.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from vlp.config import Captions
from vlp.data.captions import Choice, Texts
from vlp.data.members import (
    TEXT_TYPES,
    Content,
    fill,
    join_loose_texts,
    join_texts,
    parse_name,
    separate,
)
from vlp.data.paths import expand
from vlp.data.sources import Source, _grouped, _written, captions_of
from vlp.plugin import own_function
from vlp.types import Sample

RESERVE = 64
_TRIES = 4
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # pipe:, https:, s3:, file:
# Before a stream that failed is opened again; doubled before each further try.
_PAUSE_S = 1.0


class StreamError(RuntimeError):
    """A stream that cannot be read on, or holds something other than undecoded samples."""


@dataclass(frozen=True)
class Options(Texts):
    """Which stream, how long a pass over it is, and in how many parts it is read."""

    samples: int  # of a pass: an epoch
    # A folder, tars with braces or stars, several joined by ::, `pipe:` and addresses as webdataset
    # knows them.
    urls: str = ""
    pipeline: str = ""  # package.module:function
    parts: int = 1  # streams that are read beside one another
    run: int = 64  # samples taken from a part before the next one's turn
    # samples of a part among which the order is drawn; webdataset's shuffle, with a fixed seed
    buffer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.urls) == bool(self.pipeline):
            raise ValueError("give either urls or pipeline")
        if self.pipeline and not all(self.pipeline.partition(":")):
            raise ValueError(f"pipeline is {self.pipeline!r}; expected package.module:function")
        if min(self.samples, self.parts, self.run) < 1 or self.buffer < 0:
            raise ValueError("samples, parts and run must be at least 1, buffer at least 0")


def open(options: Options, captions: Captions) -> Stream:
    """Check that the stream can be opened; nothing is read yet. Raises ValueError."""
    stream = Stream(options, captions)
    # A part without shards is an empty stream, which ends the run at its first turn.
    if options.urls and len(stream.urls) < options.parts:
        raise ValueError(
            f"parts is {options.parts}, but urls names {len(stream.urls)} shards; set parts lower"
        )

    if options.pipeline:
        own_function(options.pipeline, "pipeline")
    return stream


def _urls_of(urls: str) -> list[str]:
    """The addresses that the option names, in order; raises ValueError for what is not there."""
    names: list[str] = []
    for pattern in urls.split("::"):
        if not pattern.strip():
            raise ValueError(f"urls is {urls!r}; expected an address on each side of every ::")
        for name in braceexpand(pattern):
            # Others are opened where they are read. What is there keeps its spelling: a resumed
            # run compares it.
            is_elsewhere = _ADDRESS.match(name) is not None
            is_there = Path(name).exists() and not Path(name).is_dir()
            names += [name] if is_elsewhere or is_there else map(str, expand(name, packed=True))
    return names


class Stream(Source):
    """Samples of a stream by their number in a pass, cheap where the numbers rise."""

    def __init__(self, options: Options, captions: Captions) -> None:
        self.options = options
        self.captions = captions
        self.choice = Choice.of(options, captions)
        self.urls: list[str] = []
        if options.urls:
            self.urls = _urls_of(options.urls)
        self.reserve = min(RESERVE, options.samples)

        self._first: list[Sample | ValueError] = []
        self._parts: dict[int, _Part] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Open streams stay in their process.
        return {**self.__dict__, "_first": [], "_parts": {}}

    def __len__(self) -> int:
        return self.options.samples

    def __getitem__(self, i: int) -> Sample:
        # Kept, because they are asked for at any time, and the stream cannot go back.
        if not self._first:
            self._first = [self._take(k) for k in range(self.reserve)]

        sample = self._first[i] if i < self.reserve else self._take(i)

        if isinstance(sample, ValueError):
            raise sample
        return sample

    def _take(self, i: int) -> Sample | ValueError:
        """Sample i, or what is wrong with it."""
        # Parts take turns of `run` samples each.
        turn, place = divmod(i, self.options.run)
        turn_of_part, part = divmod(turn, self.options.parts)
        if part not in self._parts:
            name = f"part {part} of the webdataset stream"
            self._parts[part] = _Part(partial(self._open, part), name)

        members = self._parts[part].take(turn_of_part * self.options.run + place)
        try:
            # A pipeline of somebody's own may well change members.
            if self.options.urls:
                _check_written(members)
            return _sample(i, members, self.choice, self.captions)
        except ValueError as error:
            return error

    def _open(self, part: int) -> Iterable[dict[str, Any]]:
        """The samples of a part from its beginning, as webdataset gives them."""
        import webdataset as wds
        from webdataset.tariterators import tar_file_expander, url_opener

        if self.options.pipeline:
            pipeline = own_function(self.options.pipeline, "pipeline")
            stream = pipeline(part, self.options.parts)
        else:
            shards = wds.SimpleShardList(self.urls[part :: self.options.parts])
            files = wds.DataPipeline(shards, url_opener, tar_file_expander)
            stream = _written.counted(_grouped.samples(files))

        size = self.options.buffer
        if not size:
            return stream
        # A seed of its own for each part, the same in every pass: resuming needs one order.
        shuffled = wds.filters.shuffle(size, initial=size, rng=random.Random(part))
        return shuffled(iter(stream))

    def fingerprint(self) -> str:
        content = json.dumps([asdict(self.options), self.urls])
        return hashlib.sha256(content.encode()).hexdigest()


class _Part:
    """One endless stream at a position, opened again where it ends or where an earlier sample is
    wanted.
    """

    def __init__(self, start: Callable[[], Iterable[dict[str, Any]]], name: str) -> None:
        self.start = start
        self.name = name
        self.position = 0
        self._samples: Iterator[dict[str, Any]] | None = None

    def take(self, position: int) -> dict[str, Any]:
        """The sample at `position`; raises StreamError after several tries."""
        for attempt in range(_TRIES):
            try:
                return self._advance(position)
            except StreamError:
                raise
            except Exception as error:
                # The pipeline is somebody else's: a network, a decoder, anything.
                self._samples = None
                if attempt == _TRIES - 1:
                    raise StreamError(
                        f"{self.name} fails at sample {self.position} ({_TRIES} tries): "
                        f"{type(error).__name__}: {error}"
                    ) from error
                # Longer each time: an overloaded server needs rest.
                time.sleep(_PAUSE_S * 2**attempt)
        raise AssertionError

    def _advance(self, position: int) -> dict[str, Any]:
        """Read up to the sample at `position`, from the beginning where that lies behind."""
        if self._samples is None or position < self.position:
            self._samples = self._endless()
            self.position = 0

        while True:
            sample = next(self._samples)
            self.position += 1
            if self.position > position:
                return sample

    def _endless(self) -> Iterator[dict[str, Any]]:
        """The stream, again and again; raises StreamError for an empty one."""
        while True:
            empty = True
            for sample in self.start():
                empty = False
                yield sample
            if empty:
                raise StreamError(f"{self.name} is empty: its tars hold no samples")


def _sample(i: int, members: dict[str, Any], choice: Choice, captions: Captions) -> Sample:
    """webdataset's mapping of extensions to bytes as a sample; raises ValueError for one that
    cannot be used.
    """
    content = _content(i, members)
    texts = captions_of(choice.captions(content.meta, content.text), content.meta, captions)
    if not texts:
        under = f" under {choice.names}" if choice.names else ""
        unread = "".join(f"; {reason}" for reason in (*content.notes, *content.spare))
        raise ValueError(f"no caption{under} among the members {sorted(_endings(members))}{unread}")

    return Sample(
        i,
        content.key,
        content.image,
        content.image_type,
        texts,
        content.meta,
        weights=choice.weights(content.meta, content.text),
        roles=choice.roles_of(content.meta, content.text),
    )


def _content(i: int, members: dict[str, Any]) -> Content:
    """The one sample among the members, taken apart as the members of a shard are."""
    if not isinstance(members, dict):
        raise StreamError(
            f"the webdataset pipeline gives {type(members).__name__}; expected mappings: "
            "take out to_tuple and batched"
        )

    # webdataset cuts names at the first dot, so one of its samples may be several of ours.
    parts: dict[str, dict[str, _Member]] = {}
    prefix = str(members.get("__key__", i))
    for ending in _endings(members):
        name = parse_name(f"{prefix}.{ending}")
        if name is not None and name.kind:
            data = _bytes(ending, members[ending], name.kind)
            parts.setdefault(name.key, {}).setdefault(name.kind, _Member(name.extension, data))

    parts, _ = join_loose_texts(join_texts(parts, _extension))
    samples, _ = separate(parts)
    pictured = {
        key: sample for key, sample in samples.items() if "image" in sample and sample["image"].data
    }
    if not pictured:
        raise ValueError(
            f"no image among the members {sorted(_endings(members))}; where its image stands far "
            "before, sort the tar by name, or read it by the source shards"
        )
    if len(pictured) > 1:
        raise ValueError(
            f"webdataset joins the samples {sorted(pictured)} at their first dot; "
            "read the tars by the source shards"
        )

    [(key, sample)] = pictured.items()
    content = Content(key, sample["image"].data, sample["image"].extension)
    texts = {kind: member.data for kind, member in sample.items() if kind in TEXT_TYPES}
    fill(content, texts)
    return content


def _endings(members: dict[str, Any]) -> list[str]:
    """What members are called behind their key."""
    return [ending for ending in members if not ending.startswith("__")]


def _check_written(members: dict[str, Any]) -> None:
    """Raise ValueError where members of a local tar of ours are not those that were written."""
    prefix = members["__key__"]
    by_name: dict[str, bytes] = {}
    keys: dict[str, None] = {}
    for ending, data in members.items():
        name = parse_name(f"{prefix}.{ending}")
        if not ending.startswith("__") and name is not None and name.kind:
            by_name[f"{prefix}.{ending}"] = data
            keys[name.key] = None
    # Several: webdataset joined them at their first dot, which `_content` tells.
    if len(keys) == 1:
        _written.check(members["__url__"], next(iter(keys)), by_name)


class _Member(NamedTuple):
    """A member that counts."""

    extension: str
    data: bytes


def _extension(member: _Member) -> str:
    return member.extension


def _bytes(ending: str, value: Any, kind: str) -> bytes:
    """A member's bytes; raises StreamError for what a decoder made of them."""
    if isinstance(value, str) and kind in TEXT_TYPES:
        return value.encode()

    if not isinstance(value, bytes):
        raise StreamError(
            f"the webdataset pipeline gives {ending!r} as {type(value).__name__}; "
            "expected bytes: take out decode"
        )
    return value
