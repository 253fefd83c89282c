"""The shards of a pack, and what clip_benchmark's layout has beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlp.data import stored
from vlp.data_tools._run.shards import windows
from vlp.data_tools._run.work import Job, Pool, Result, carry_out
from vlp.data_tools.pack import chunks, claims
from vlp.data_tools.pack.pictures import Pictures, sum_of
from vlp.files import write_atomically

if TYPE_CHECKING:
    from vlp.data.archives import Place
    from vlp.data.format import ShardWriter
    from vlp.data.listing import Named
    from vlp.data_tools.pack.stored_draft import StoredDraft
    from vlp.data_tools.pack.target import Draft

_AHEAD = 64  # pictures that are read before they are written
_OPTIONS = ("samples_per_shard", "layout", "split", "template", "on_missing")


class Shards(NamedTuple):
    """What was written."""

    n: int
    totals: dict[str, int]  # sums of `Written.numbers`


def plan_of(
    named: Sequence[Named],
    inputs: chunks.Inputs,
    classes: list[str],
    args: argparse.Namespace,
    pictures: Pictures,
) -> str:
    """A digest of all that the shards depend on: options, texts, and which pictures lie there."""
    from PIL import __version__ as encoder

    from vlp import __version__

    options = {name: getattr(args, name) for name in _OPTIONS}
    digest = hashlib.sha256()

    def add(value: object) -> None:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())

    add([__version__, encoder, options, asdict(pictures), classes])
    # Rows of chunks that were encoded before JSON was kept true do not say what it must say.
    if pictures.change:
        add("claims")
    states: dict[str, list[int | str]] = {}
    for item, name in named:
        place = inputs.place(name)
        # Of a tar, which holds them all, once.
        if place.path not in states or place.size < 0:
            states[place.path] = inputs.state(name)
        where = [name, place.offset, place.size, *states[place.path]]
        add([where, item.image, item.captions, item.meta])
    return digest.hexdigest()


def write_shards(
    named: list[Named],
    inputs: chunks.Inputs,
    classes: list[str],
    args: argparse.Namespace,
    draft: Draft | StoredDraft,
    pictures: Pictures,
    pool: Pool,
) -> Shards:
    """Write the shards that are not there yet, and the files beside them."""
    from vlp.data.format import index_written
    from vlp.data.listing import families
    from vlp.files import remove_leftovers

    draft.make_room()

    parts = list(_parts(families(named), args.samples_per_shard))
    encoded = None
    if pictures.change:
        ordered = list(chain.from_iterable(parts))
        encoded = chunks.encode(ordered, inputs, pictures, draft.made, pool)

    is_benchmark = args.layout == "clip_benchmark"
    work = WriteShard(
        folder=draft.folder / args.split if is_benchmark else draft.folder,
        samples_per_shard=args.samples_per_shard,
        shard_name="{}" if is_benchmark else "{:05d}",
        class_numbers={name: i for i, name in enumerate(classes)},
        is_retrieval=is_benchmark and not classes,
        encoded=encoded,
        n_threads=chunks.n_threads(pool),
        copies=inputs.copies,
    )
    carry_out("pack", _jobs(parts, inputs, draft.made / "shards"), work, pool)

    # Nobody writes any more, not even a process that was taken for lost.
    for folder in {draft.folder, work.folder}:
        remove_leftovers(folder)
    paths = [work.path(number) for number in range(len(parts))]
    _write_lists(work.folder, classes, args, len(paths), draft.folder)
    index_written(paths)
    return Shards(len(paths), sum_of(map(_stats, paths)))


def _parts(families: list[list[Named]], samples_per_shard: int) -> Iterator[list[Named]]:
    """The items of each shard: as many families as fit, or one that is larger."""
    part: list[Named] = []
    for family in families:
        if part and len(part) + len(family) > samples_per_shard:
            yield part
            part = []
        part += family
    if part:
        yield part


class _Part(NamedTuple):
    """What one shard is made of."""

    number: int
    start: int  # of its first picture, among those of all shards
    named: list[Named]
    places: list[Place]  # of its pictures in the input
    seen: Path  # the first one's file: a node of a cluster is asked whether it is there


def _jobs(parts: list[list[Named]], inputs: chunks.Inputs, marks: Path) -> list[Job]:
    """A job a shard, as large as it has pictures."""
    marks.mkdir(parents=True, exist_ok=True)
    jobs = []
    start = 0
    for number, named in enumerate(parts):
        places = [inputs.place(name) for _, name in named]
        part = _Part(number, start, named, places, stored.source(places[0].path))
        jobs.append(Job(marks / f"{number:05d}.json", part, len(named)))
        start += len(named)
    return jobs


@dataclass(frozen=True)
class WriteShard:
    """Writes one shard of a pack."""

    folder: Path
    samples_per_shard: int
    shard_name: str
    class_numbers: dict[str, int]
    is_retrieval: bool  # clip_benchmark reads all captions of an image from its .txt
    encoded: chunks.Encoded | None  # None: all pictures stay as they came
    n_threads: int
    copies: Path | None  # of pictures in a store, as `chunks.Inputs` says

    def path(self, number: int) -> Path:
        """Where a shard goes."""
        return self.folder / f"{self.shard_name.format(number)}.tar"

    def __call__(self, part: _Part) -> Result:
        from vlp.data.format import ShardWriter

        writer = ShardWriter(
            self.folder,
            self.samples_per_shard,
            first_shard=part.number,
            overwrite=True,
            shard_name=self.shard_name,
            indexed=False,
        )
        with (
            self._rows(part) as rows,
            writer,
            ThreadPoolExecutor(self.n_threads) as threads,
        ):
            # Read a few ahead: a file system may answer late.
            pictures = zip(part.named, rows, strict=True)
            for ahead in windows(pictures, _AHEAD):
                with chunks.here([row.place for _, row in ahead], self.copies) as places:
                    images = list(threads.map(_image, ahead, places))
                for (pair, row), image in zip(ahead, images, strict=True):
                    self._add(writer, pair, row, image)

        # Another shard's place would be taken by what does not fit into this one.
        assert len(writer.paths) == 1, f"shard {part.number} has become {writer.paths}"
        return {"counts": {"samples read": len(part.named)}}

    def _rows(self, part: _Part) -> AbstractContextManager[Iterator[chunks.Row]]:
        """The pictures of a shard in order."""
        if self.encoded is None:
            return nullcontext(chunks.Row(place, "", {}, {}) for place in part.places)
        return self.encoded.rows(part.start, part.places)

    def _add(self, writer: ShardWriter, pair: Named, row: chunks.Row, image: bytes) -> None:
        """Write one sample; a ValueError names its image."""
        from vlp.data.archives import image_type

        item, name = pair
        meta = dict(item.meta)
        claims.put(meta, row.true)
        cls = self.class_numbers.get(item.class_name or "", item.meta.get("cls"))
        if type(cls) is not int or cls < 0:
            cls = None  # it stays in the JSON
        try:
            writer.add(
                None,
                image,
                row.extension or image_type(name),
                item.captions,
                meta,
                cls,
                txt=_caption_lines(item.captions) if self.is_retrieval else None,
                numbers=row.numbers,
            )
        except ValueError as error:
            raise ValueError(f"{item.image}: {error}") from None


def _image(of_sample: tuple[Named, chunks.Row], place: Place) -> bytes:
    """The bytes of a picture, which lies at `place`; a ValueError names it."""
    (_, name), _ = of_sample
    try:
        return place.read()
    except ValueError as error:
        raise ValueError(f"image {name!r} cannot be used: {error}") from None


def _write_lists(
    inner: Path, classes: list[str], args: argparse.Namespace, n_shards: int, folder: Path
) -> None:
    """Write what readers look for beside the shards, which lie in the folder `inner`."""
    texts = {"classnames.txt": classes}
    if args.layout == "clip_benchmark":
        write_atomically(inner / "nshards.txt", f"{n_shards}\n".encode())
        # clip_benchmark formats its templates with c=…, everybody else's have empty braces.
        texts["zeroshot_classification_templates.txt"] = [
            template.replace("{}", "{c}") for template in args.template
        ]
        texts["dataset_type.txt"] = [] if classes else ["retrieval"]
    for name, lines in texts.items():
        if lines:
            write_atomically(folder / name, ("\n".join(lines) + "\n").encode())


def _stats(path: Path) -> dict:
    from vlp.data.digests import stats_of

    return json.loads(stats_of(path).read_bytes())


def _caption_lines(captions: Sequence[str]) -> str:
    """A caption a line, as clip_benchmark reads them; a training .txt holds one caption."""
    return "\n".join(" ".join(caption.split()) for caption in captions)
