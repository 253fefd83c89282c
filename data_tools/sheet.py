"""`vlp data sheet`: some samples of a data set with their captions, as one picture or one page, to
look at.

Samples are drawn by seed. Where there are more shards than samples, as many shards are drawn first
and only those are read, so that a look at a large data set stays quick; samples of small shards are
then drawn more often than others.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import random
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlp.data.stored import destination_file
from vlp.data_tools._run import work

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlp.data.members import Content
    from vlp.data.rows import Shard
    from vlp.eval.report.markup import Html

HELP = "a contact sheet of random samples with their captions, as PNG or HTML"
EXAMPLE = """vlp data sheet data/train --to sheet.html
  vlp data sheet data/train --to sheet.png --samples 60 --columns 6 --seed 1
  vlp data sheet "s3://bucket/{00000..41407}.tar" --to sheet.html --samples 500 --ray
"""
_GAP, _LINE, _MAX_LINES = 8, 13, 6  # pixels, pixels, lines of caption under a picture of a PNG


class Shown(NamedTuple):
    """A sample on the sheet; without a picture, `problem` says why."""

    key: str
    captions: tuple[str, ...]
    negatives: list[list[str]]  # of each caption, those that are used beside it
    picture: Image | None
    problem: str


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlp data sheet`."""
    add = parser.add_argument
    add("source", help="shards: a folder, a tar, or a pattern with braces; several joined by ::")
    add(
        "--to",
        required=True,
        type=destination_file,
        metavar="FILE",
        help=".html (all captions with their negatives, any script) or .png",
    )

    # What is on it.
    add("--samples", type=int, default=48, metavar="N", help="default: %(default)s")
    add(
        "--columns",
        type=int,
        default=6,
        metavar="N",
        help="pictures side by side in a PNG (default: %(default)s)",
    )
    add(
        "--size",
        type=int,
        default=192,
        metavar="PX",
        # Which samples.
        help="longest side of a picture (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="another seed, other samples (default: %(default)s)")
    work.undivided_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the sheet and say what is on it. Raises ValueError."""
    from vlp.data.paths import expand
    from vlp.files import write_atomically

    if args.to.suffix not in (".html", ".png"):
        raise ValueError(f"--to {args.to} is neither .html nor .png")
    if min(args.samples, args.columns) < 1 or args.size < 16:
        raise ValueError("--samples and --columns must be at least 1, --size at least 16")
    pool = work.undivided(args)
    counts: Counter[str] = Counter()
    drawn = draw(expand(args.source), args.samples, args.seed, counts)
    shown = _shown(drawn, args.size, pool, counts)
    if not shown:
        raise ValueError(f"{args.source} holds no usable sample")
    if args.to.suffix == ".html":
        data = page(shown, args.source).encode(errors="replace")
    else:
        data = png(shown, args.columns, args.size)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.to, data)

    n_broken = sum(item.picture is None for item in shown)
    print(
        f"{args.to}: {len(shown)} samples, {n_broken} without a readable picture; "
        f"{counts['problems']} problems in the shards read"
    )
    return 0


class Drawn(NamedTuple):
    """Where a sample stands: a shard, and its number there."""

    path: Path
    shard: Shard
    number: int


def draw(paths: list[Path], n: int, seed: int, counts: Counter[str]) -> list[Drawn]:
    """At most `n` samples in random order, the same for the same shards and seed."""
    from vlp.data.index import index

    # As many shards at most as samples, so that a look at a large data set reads few.
    rng = random.Random(seed)
    paths = sorted(rng.sample(paths, min(n, len(paths))))
    shards = index(paths)
    counts["problems"] += sum(shard.n_problems for shard in shards)
    places = []
    for path, shard in zip(paths, shards):
        places += [Drawn(path, shard, i) for i in range(shard.count)]
    return rng.sample(places, min(n, len(places)))


class _OfShard(NamedTuple):
    """The samples that are drawn of one shard, and where each stands on the sheet."""

    path: Path
    shard: Shard
    numbers: list[int]
    places: list[int]


def _shown(drawn: list[Drawn], size: int, pool: work.Pool, counts: Counter[str]) -> list[Shown]:
    """The drawn samples that are still there, as they are shown."""
    of_shards: dict[Path, _OfShard] = {}
    for place, (path, shard, number) in enumerate(drawn):
        of_shard = of_shards.setdefault(path, _OfShard(path, shard, [], []))
        of_shard.numbers.append(number)
        of_shard.places.append(place)

    shown: dict[int, Shown] = {}
    look = partial(_look, size=size)
    for of_shard, samples in pool.finished(look, list(of_shards.values())):
        for place, sample in zip(of_shard.places, samples, strict=True):
            if sample is None:
                counts["problems"] += 1  # it changed after it was indexed
            else:
                shown[place] = sample
    return [shown[place] for place in sorted(shown)]


def _look(of_shard: _OfShard, *, size: int) -> list[Shown | None]:
    """The samples of one shard, None for those that changed since it was indexed."""
    samples: list[Shown | None] = []
    with open(of_shard.path, "rb") as file:
        for number in of_shard.numbers:
            try:
                sample = of_shard.shard.sample(file, number)
            except ValueError:
                samples.append(None)
                continue
            # Made small at once: hundreds of pictures are held together.
            samples.append(show(sample, size))
    return samples


def show(sample: Content, size: int) -> Shown:
    """A sample with its picture at the size of the sheet."""
    from vlp.data.picture import BadImage, rgb
    from vlp.data.wrong_captions import read

    wrong = read(sample.meta, "negatives", sample.captions)
    negatives = []
    for caption in sample.captions:
        valid_places = (place for place in wrong.of(caption) if wrong.valid[place])
        negatives.append([wrong.texts[place] for place in valid_places])

    try:
        # Twice the size, so that the thumbnail is still scaled down and stays sharp.
        picture = rgb(sample.image, side=2 * size)
    except BadImage as error:
        return Shown(sample.key, sample.captions, negatives, None, str(error))
    picture.thumbnail((size, size))
    return Shown(sample.key, sample.captions, negatives, picture, "")


def page(shown: list[Shown], title: str) -> str:
    """The sheet as one HTML page that loads nothing; captions are text and never markup."""
    from vlp.eval.report import markup
    from vlp.eval.report.markup import tag
    from vlp.privacy import private

    cards = [_card(item) for item in shown]
    section = markup.section("samples", f"{len(shown)} samples", tag("div", cards, class_="cards"))
    return markup.page(private(title), [section], "vlp data sheet")


def _card(item: Shown) -> Html:
    """A sample's key, picture and captions, each caption followed by what is wrong beside it."""
    from vlp.eval.report import markup
    from vlp.eval.report.markup import tag

    if item.picture is None:
        picture = markup.note(item.problem)
    else:
        # Inside the page, which then can be sent or moved as one file.
        file = io.BytesIO()
        item.picture.save(file, "JPEG", quality=88)
        data = base64.b64encode(file.getvalue()).decode()
        picture = tag("img", src=f"data:image/jpeg;base64,{data}", alt="", style="max-width:100%")

    lines = []
    for caption, negatives in zip(item.captions, item.negatives):
        lines.append(tag("li", tag("span", caption)))
        lines += [tag("li", tag("small", f"not: {negative}")) for negative in negatives]
    texts = tag("ol", lines, class_="texts")
    return tag("figure", tag("figcaption", item.key), picture, texts, class_="card")


def png(shown: list[Shown], columns: int, size: int) -> bytes:
    """The sheet as one picture: the first captions below, cut to a few lines; letters beyond the
    font's show as boxes.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(11)
    if size > 96:  # no wider than the widest picture; below, captions need the room
        sides = [max(item.picture.size) for item in shown if item.picture is not None]
        size = max([96, *sides])
    cell_width = size + _GAP
    cell_height = size + _GAP + _LINE * _MAX_LINES + _GAP
    n_rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, n_rows * cell_height + _GAP), "white")

    pen = ImageDraw.Draw(sheet)
    for place, item in enumerate(shown):
        row, column = divmod(place, columns)
        left = _GAP + column * cell_width
        top = _GAP + row * cell_height
        if item.picture is not None:
            # Centred, and standing on the caption.
            width, height = item.picture.size
            sheet.paste(item.picture, (left + (size - width) // 2, top + size - height))

        caption = item.captions[0] if item.captions else "(no caption)"
        lines = textwrap.wrap(item.problem or caption, max(8, size // 6))[:_MAX_LINES]
        color = "firebrick" if item.problem else "black"
        place_of_text = (left, top + size + _GAP // 2)
        pen.text(place_of_text, "\n".join(lines), color, font, spacing=1)

    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
