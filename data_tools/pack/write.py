"""The shards of a pack, and what clip_benchmark's layout has beside them."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlp.data_tools.pack.pictures import Pictures, sum_of
from vlp.data_tools.pack.progress import progress

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.format import ShardWriter
    from vlp.data.listing import Named
    from vlp.data_tools.pack.pictures import Written

_AHEAD = 64  # images that are read and encoded before they are written
_OPTIONS = ("samples_per_shard", "layout", "split", "template", "on_missing")


class Shards(NamedTuple):
    """What was written."""

    n: int
    totals: dict[str, int]  # sums of `Written.numbers`


def plan_of(
    named: Sequence[Named],
    archive: Archive,
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
    states: dict[str, tuple[int, int]] = {}
    for item, name in named:
        place = archive.place(name)
        # Of a tar, which holds them all, once.
        if place.path not in states or place.size < 0:
            status = os.stat(place.path)
            states[place.path] = (status.st_size, status.st_mtime_ns)
        where = [name, place.offset, place.size, *states[place.path]]
        add([where, item.image, item.captions, item.meta])
    return digest.hexdigest()


def write_shards(
    named: list[Named],
    archive: Archive,
    classes: list[str],
    args: argparse.Namespace,
    folder: Path,
    pictures: Pictures,
) -> Shards:
    """Write the shards that are not there yet, and the files beside them."""
    from vlp.data.format import ShardWriter, index
    from vlp.data.listing import families

    is_benchmark = args.layout == "clip_benchmark"
    is_retrieval = is_benchmark and not classes
    inner = folder / args.split if is_benchmark else folder
    shard_name = "{}" if is_benchmark else "{:05d}"
    class_number = {name: i for i, name in enumerate(classes)}

    earlier, n_before = _finished(inner, shard_name)
    if earlier:
        print(f"goes on after {len(earlier)} finished shards with {n_before:,} images")
    rest = list(_after(families(named), n_before))

    with ShardWriter(
        inner,
        args.samples_per_shard,
        first_shard=len(earlier),
        shard_name=shard_name,
        indexed=False,
    ) as writer:
        ready = _ready(rest, archive, pictures)
        for family in progress(rest, "packed", len, n_before):
            writer.make_room(len(family))
            for item, name in family:
                cls = class_number.get(item.class_name or "", item.meta.get("cls"))
                if type(cls) is not int or cls < 0:
                    cls = None  # it stays in the JSON
                txt = _caption_lines(item.captions) if is_retrieval else None
                _add(writer, (item, name), next(ready), cls, txt)
    paths = [*earlier, *writer.paths]
    index(paths)

    texts = {"classnames.txt": classes}
    if is_benchmark:
        (inner / "nshards.txt").write_text(f"{len(paths)}\n")
        # clip_benchmark formats its templates with c=…, everybody else's have empty braces.
        texts["zeroshot_classification_templates.txt"] = [
            template.replace("{}", "{c}") for template in args.template
        ]
        texts["dataset_type.txt"] = ["retrieval"] if is_retrieval else []
    for name, lines in texts.items():
        if lines:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Shards(len(paths), sum_of(map(_stats, paths)))


def _add(
    writer: ShardWriter, pair: Named, written: Written, cls: int | None, txt: str | None
) -> None:
    """Write one sample; a ValueError names its image."""
    from vlp.data.archives import image_type

    item, name = pair
    extension = written.extension or image_type(name)
    try:
        writer.add(
            None,
            written.data,
            extension,
            item.captions,
            item.meta,
            cls,
            txt=txt,
            numbers=written.numbers,
        )
    except ValueError as error:
        raise ValueError(f"{item.image}: {error}") from None


def _ready(
    families: Iterable[list[Named]], archive: Archive, pictures: Pictures
) -> Iterator[Written]:
    """The pictures in order, read and encoded by threads a few ahead: Pillow's coders leave the
    interpreter to others.
    """
    pairs = chain.from_iterable(families)
    names = [name for _, name in pairs]

    def written(name: str) -> Written:
        try:
            return pictures.written(archive.read(name))
        except ValueError as error:
            raise ValueError(f"image {name!r} cannot be used: {error}") from None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(names), _AHEAD):
            yield from threads.map(written, names[start : start + _AHEAD])


def _finished(folder: Path, shard_name: str) -> tuple[list[Path], int]:
    """The shards that an earlier call finished, and how many samples they hold; an unfinished one
    is removed.
    """
    from vlp.data.digests import stats_of

    paths: list[Path] = []
    n_samples = 0
    while True:
        path = folder / f"{shard_name.format(len(paths))}.tar"
        # The statistics are written last.
        if not (path.exists() and stats_of(path).exists()):
            break
        n_samples += _stats(path)["count"]
        paths.append(path)

    for leftover in [path, *folder.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    return paths, n_samples


def _stats(path: Path) -> dict:
    from vlp.data.digests import stats_of

    return json.loads(stats_of(path).read_bytes())


def _after(families: list[list[Named]], n_images: int) -> Iterator[list[Named]]:
    """The families after the first `n_images` images: shards end where families do."""
    for family in families:
        if n_images > 0:
            n_images -= len(family)
        else:
            yield family


def _caption_lines(captions: Sequence[str]) -> str:
    """A caption a line, as clip_benchmark reads them; a training .txt holds one caption."""
    return "\n".join(" ".join(caption.split()) for caption in captions)
