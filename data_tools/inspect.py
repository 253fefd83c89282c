"""`vlp data inspect`: what a data set holds, from its index and a sample of its images, and how
fast it reads.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from itertools import chain
from typing import Any

from vlp.data.stored import destination_file

HELP = "show counts, picture sizes, caption lengths and reading speed of shards"
EXAMPLE = """vlp data inspect data/train
  vlp data inspect "data/{00000..00041}.tar" --samples 5000 --json summary.json
                                       (reads a few samples, here: there is no --ray)
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


def run(args: argparse.Namespace) -> int:
    """Print the summary. Raises ValueError, OSError."""
    from vlp.files import write_atomically

    summary = summarise(args.path, args.samples)
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


def summarise(path: str, n: int) -> dict[str, Any]:
    """Counts of the whole data set, and distributions over n of its samples drawn at random (the
    same each time).
    """
    from vlp.config import Captions
    from vlp.data.paths import expand
    from vlp.data.picture import BadImage, array, header
    from vlp.data.sources.shards import Options, opened
    from vlp.data.stored import source as place_of
    from vlp.data_tools.stats import quantiles

    # Samples without captions are data too: the template only keeps those with a class from being
    # dropped.
    captioned = Captions(class_templates=["{}"], missing="drop")
    source = opened(expand(path), Options(path), captioned)
    drawn = random.Random(0).sample(range(len(source)), min(n, len(source)))

    # Reading and decoding apart: one waits for the disk, the other for the processor.
    start = time.monotonic()
    samples, altered = [], []
    for i in drawn:
        # Where a shard changed after it was indexed, the sample is one problem among others.
        try:
            samples.append(source[i])
        except ValueError as error:
            altered.append(f"{source.paths[source.shard_of(i)]}: {error}")
    read_s = time.monotonic() - start

    start = time.monotonic()
    sizes, readable, unreadable = [], [], []
    for sample in samples:
        try:
            sizes.append(array(sample.image).shape[:2])
            readable.append(sample.image)
        except BadImage as error:
            unreadable.append(f"{sample.key}: {error}")
    decode_s = time.monotonic() - start

    headers = [header(image) for image in readable]
    fields = Counter(chain.from_iterable(sample.meta for sample in samples))
    captions = list(chain.from_iterable(sample.captions for sample in samples))
    return {
        "shards": len(source.paths),
        "samples": len(source),
        "bytes": sum(place_of(p).stat().st_size for p in source.paths),
        "left_out": source.n_left_out,
        "odd_or_passed_over": dict(source.left_out.most_common(20)),
        "problems": source.problems()[:10],
        "samples_read": len(samples),
        "altered_samples": altered[:10],
        "unreadable_images": unreadable[:10],
        "image_types": dict(Counter(sample.image_type for sample in samples).most_common()),
        "turned_by_exif": sum(each.turned for each in headers),
        "with_transparency": sum(each.transparent for each in headers),
        "height_px": quantiles(Counter(height for height, _ in sizes)),
        "width_px": quantiles(Counter(width for _, width in sizes)),
        "image_kB": quantiles(Counter(round(len(sample.image) / 1e3, 1) for sample in samples)),
        "samples_with_text_in": dict(source.names.most_common(20)),
        "captions_a_sample": quantiles(Counter(len(sample.captions) for sample in samples)),
        "words_a_caption": quantiles(Counter(len(caption.split()) for caption in captions)),
        "json_fields": dict(fields.most_common()),
        "read_samples_a_s": round(len(samples) / max(read_s, 1e-9)),
        "decode_samples_a_s": round(len(samples) / max(decode_s, 1e-9)),
    }
