"""`vlp data inspect`: what a data set holds, from its index and a sample of its images, and how
fast it reads.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlp.data.stored import destination_file
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from vlp.data.sources.shards import Shards
    from vlp.types import Sample

HELP = "show counts, picture sizes, caption lengths and reading speed of shards"
EXAMPLE = """vlp data inspect data/train
  vlp data inspect "data/{00000..00041}.tar" --samples 5000 --json summary.json
  vlp data inspect "s3://bucket/{00000..41407}.tar" --samples 100000 --ray
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data inspect`."""
    parser.add_argument(
        "path", help="folder of shards, tar, or pattern with braces; several joined by ::"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1000,
        metavar="N",
        help="samples to read, at random (default: 1000)",
    )
    parser.add_argument(
        "--json", type=destination_file, metavar="FILE", help="where to write the numbers"
    )
    work.undivided_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the summary. Raises ValueError, OSError."""
    from vlp.files import write_atomically

    if args.samples < 0:
        raise ValueError(f"--samples {args.samples} must be at least 0")
    summary = summarise(args.path, args.samples, work.undivided(args))
    for name, value in summary.items():
        print(f"{name.replace('_', ' '):<22}{_shown(value)}")

    # The same numbers for a program.
    if args.json:
        encoded = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        write_atomically(args.json, encoded.encode())
    return 0


def _shown(value: Any) -> str:
    """A value of the summary as a line, or a list of problems as a line each."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {n}" for name, n in value.items()) or "none"
    if isinstance(value, list):
        return "\n  ".join(["", *map(str, value)]) or "none"
    return str(value) if value != "" else "none"


class Look(NamedTuple):
    """What reading a sample tells. `problem`: why it could not be read or, as an image, opened; of
    one that could not be read the rest is empty.
    """

    is_read: bool
    problem: str = ""
    height: int = 0
    width: int = 0
    turned: bool = False
    transparent: bool = False
    n_bytes: int = 0
    image_type: str = ""
    fields: tuple[str, ...] = ()
    words: tuple[int, ...] = ()  # of each caption


class OfShard(NamedTuple):
    """The samples that are drawn of one shard."""

    path: Path
    samples: list[int]  # as the source numbers them
    places: list[int]  # of each among all that are drawn


class Looks(NamedTuple):
    """What reading the samples of one shard tells, and how long that took."""

    looks: list[Look]
    read_s: float
    decode_s: float


def summarise(path: str, n: int, pool: work.Pool | None = None) -> dict[str, Any]:
    """Counts of the whole data set, and distributions over n of its samples drawn at random (the
    same each time). The speeds are those of one process.
    """
    from vlp.config import Captions
    from vlp.data.paths import expand
    from vlp.data.rows import of_modalities
    from vlp.data.sources.shards import Options, opened
    from vlp.data.stored import source as place_of

    # Samples without captions are data too: the template only keeps those with a class from being
    # dropped.
    captioned = Captions(class_templates=["{}"], missing="drop")
    source = opened(expand(path), Options(path), captioned)
    drawn = random.Random(0).sample(range(len(source)), min(n, len(source)))

    looks, read_s, decode_s = _looks(source, drawn, pool or work.Pool())
    for_modalities = of_modalities(source.left_out)
    source.take_back(for_modalities.keys())
    sampled = {
        "shards": len(source.paths),
        "samples": len(source),
        "bytes": sum(place_of(p).stat().st_size for p in source.paths),
        "left_out": source.n_left_out,
        "members_of_modalities": {
            kind.removeprefix("members "): n for kind, n in for_modalities.items()
        },
        "odd_or_passed_over": dict(source.left_out.most_common(20)),
        "problems": source.problems()[:10],
    }
    return sampled | _told(looks, read_s, decode_s, source.names)


def _looks(source: Shards, drawn: list[int], pool: work.Pool) -> Looks:
    """What reading these samples tells, in their order, and the time of all processes together."""
    from vlp.data.stored import source as place_of

    of_shards: dict[int, OfShard] = {}
    for place, sample in enumerate(drawn):
        number = source.shard_of(sample)
        path = place_of(source.paths[number])
        of_shard = of_shards.setdefault(number, OfShard(path, [], []))
        of_shard.samples.append(sample)
        of_shard.places.append(place)

    look_at: dict[int, Look] = {}
    read_s = decode_s = 0.0
    for of_shard, looks in pool.finished(Reader(source), list(of_shards.values())):
        look_at |= zip(of_shard.places, looks.looks, strict=True)
        read_s += looks.read_s
        decode_s += looks.decode_s
    return Looks([look_at[place] for place in range(len(drawn))], read_s, decode_s)


@dataclass(frozen=True)
class Reader:
    """Reads and opens samples."""

    source: Shards

    def __call__(self, of_shard: OfShard) -> Looks:
        # Before the clock runs: in a new process that takes longer than the pictures.
        importlib.import_module("vlp.data.picture")

        # Reading and decoding apart: one waits for the disk, the other for the processor.
        start = time.monotonic()
        samples = [self._sample(i) for i in of_shard.samples]
        read_s = time.monotonic() - start

        start = time.monotonic()
        opened = [_opened(sample) for sample in samples]
        decode_s = time.monotonic() - start
        looks = [_look(sample, image) for sample, image in zip(samples, opened, strict=True)]
        return Looks(looks, read_s, decode_s)

    def _sample(self, i: int) -> Sample | str:
        """Sample i; where its shard changed after it was indexed, one problem among others."""
        try:
            return self.source[i]
        except ValueError as error:
            return f"{self.source.paths[self.source.shard_of(i)]}: {error}"


def _opened(sample: Sample | str) -> tuple[int, int] | str:
    """Height and width of a sample's image, decoded; why not, where it cannot be."""
    from vlp.data.picture import BadImage, array

    if isinstance(sample, str):
        return sample
    try:
        height, width, _ = array(sample.image).shape
    except BadImage as error:
        return f"{sample.key}: {error}"
    return height, width


def _look(sample: Sample | str, opened: tuple[int, int] | str) -> Look:
    """What is told of a sample."""
    from vlp.data.picture import header

    if isinstance(sample, str):
        return Look(False, sample)
    look = Look(
        True,
        n_bytes=len(sample.image),
        image_type=sample.image_type,
        fields=tuple(sample.meta),
        words=tuple(len(caption.split()) for caption in sample.captions),
    )
    if isinstance(opened, str):
        return look._replace(problem=opened)

    height, width = opened
    about = header(sample.image)
    return look._replace(
        height=height, width=width, turned=about.turned, transparent=about.transparent
    )


def _told(looks: list[Look], read_s: float, decode_s: float, names: Counter[str]) -> dict[str, Any]:
    """The part of the summary that is of the samples that were drawn; `names`: how many samples of
    all have a text under each name.
    """
    from vlp.data_tools.stats import quantiles

    read = [look for look in looks if look.is_read]
    readable = [look for look in read if not look.problem]
    fields = Counter(chain.from_iterable(look.fields for look in read))
    return {
        "samples_read": len(read),
        "altered_samples": [look.problem for look in looks if not look.is_read][:10],
        "unreadable_images": [look.problem for look in read if look.problem][:10],
        "image_types": dict(Counter(look.image_type for look in read).most_common()),
        "turned_by_exif": sum(look.turned for look in readable),
        "with_transparency": sum(look.transparent for look in readable),
        "height_px": quantiles(Counter(look.height for look in readable)),
        "width_px": quantiles(Counter(look.width for look in readable)),
        "image_kB": quantiles(Counter(round(look.n_bytes / 1e3, 1) for look in read)),
        "samples_with_text_in": dict(names.most_common(20)),
        "captions_a_sample": quantiles(Counter(len(look.words) for look in read)),
        "words_a_caption": quantiles(Counter(chain.from_iterable(look.words for look in read))),
        "json_fields": dict(fields.most_common()),
        "read_samples_a_s": round(len(read) / max(read_s, 1e-9)),
        "decode_samples_a_s": round(len(read) / max(decode_s, 1e-9)),
    }
