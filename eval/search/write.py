"""`vlp embed`: the embeddings of pictures or texts as one file that other tools read.

    FILE.npy        [n, D] float32 unit rows; FILE.names.jsonl beside it, a name a line
    FILE.parquet    columns name (string) and embedding (list of D float32)

Pictures that do not open are left out and named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlp import locks
from vlp.eval.search import options as shared

if TYPE_CHECKING:
    import numpy as np

    from vlp.eval.models import Encoder
    from vlp.eval.search.library import Library

HELP = "write the embeddings of pictures or texts as .npy or .parquet"
EXAMPLE = """examples:
  vlp embed exported/demo photos --to photos.npy
  vlp embed exported/demo "shards/{000..041}.tar" --to photos.parquet
  vlp embed exported/demo --texts captions.txt --to captions.npy

PHOTOS: a folder, a tar, a pattern of tars, a picture; several joined by ::. Pictures are embedded
once and kept as those of `vlp search`. For training, `vlp data embed` writes a file a shard.
"""
_TEXTS = 1024  # texts of a block
_ADVICE = "Wait until it is done, or write to another file with --to."

Block = tuple[list[str], "np.ndarray"]  # names and rows [n, D] float32


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="a run, an export, or any reference of `vlp eval`")
    add("photos", nargs="?", metavar="PHOTOS", help="what is embedded (see below)")
    add("--texts", metavar="FILE", help="embed the lines of a file instead of pictures")
    add("--to", required=True, metavar="FILE", help="FILE.npy or FILE.parquet")
    shared.arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Wrong input is a ValueError that helps."""
    target = Path(options.to)
    if target.suffix not in (".npy", ".parquet"):
        raise ValueError(f"--to {target}: expected a name that ends in .npy or .parquet")
    if (options.photos is None) == (options.texts is None):
        raise ValueError("expected either PHOTOS or --texts FILE; give one of them")

    # Two files for .npy: of two writers one's rows could meet the other's names.
    with locks.held(target, advice=_ADVICE, beside=True):
        return _write(options, target)


def _write(options: argparse.Namespace, target: Path) -> int:
    """Embed what is asked for, and write it."""
    if options.texts is not None:
        texts = _lines(Path(options.texts))
        encoder = shared.encoder(options)
        n, width = len(texts), encoder.encode_texts(texts[:1]).shape[1]
        blocks = _of_texts(encoder, texts, shared.context(options, encoder.device).batch)
    else:
        opened = _library(options)
        n, width, blocks = len(opened.pictures), opened.width, _of_library(opened)

    target.parent.mkdir(parents=True, exist_ok=True)
    write = _write_npy if target.suffix == ".npy" else _write_parquet
    write(target, blocks, n, width)
    print(f"{target}: {n:,} rows of {width}")
    return 0


def _lines(path: Path) -> list[str]:
    """The lines of a file of texts; raises ValueError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--texts {path} cannot be read: {error}") from None
    if not text:
        raise ValueError(f"--texts {path} is empty; expected a text a line")
    # At line feeds alone: a form feed or U+2028 within a caption begins no line for other tools.
    lines = text.removesuffix("\n").split("\n")

    # A row a line: which line has none could not be told afterwards.
    if empty := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        raise ValueError(f"--texts {path} has an empty line, number {empty[0]}; remove it")
    return lines


def _library(options: argparse.Namespace) -> Library:
    from vlp.eval.search import library
    from vlp.eval.search.listing import pictures_in

    pictures = pictures_in(options.photos)
    encoder = shared.encoder(options)
    folder = Path(options.index) if options.index else library.place_of(encoder, options.photos)
    return library.update(folder, encoder, pictures, shared.context(options, encoder.device))


def _of_library(opened: Library) -> Iterator[Block]:
    import numpy as np

    for part in opened.parts:
        rows = part.rows()[part.counts].astype(np.float32)
        numbers = part.first + np.flatnonzero(part.counts)
        # Stored as float16: unit again at the precision of what is written.
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        yield [opened.pictures[number].name for number in numbers.tolist()], rows


def _of_texts(encoder: Encoder, texts: list[str], batch: int) -> Iterator[Block]:
    import torch

    for first in range(0, len(texts), _TEXTS):
        block = texts[first : first + _TEXTS]
        rows = [
            encoder.encode_texts(block[i : i + batch]).cpu() for i in range(0, len(block), batch)
        ]
        yield block, torch.cat(rows).numpy()


def _write_npy(target: Path, blocks: Iterable[Block], n: int, width: int) -> None:
    """Both files, a block at a time; the rows get their name last."""
    import numpy as np

    from vlp.files import replacing, write_atomically

    with replacing(target) as temporary:
        rows = np.lib.format.open_memmap(temporary, "w+", np.float32, (n, width))
        lines, first = [], 0
        for names, block in blocks:
            rows[first : first + len(block)] = block
            first += len(block)
            lines += [json.dumps(name, ensure_ascii=False) for name in names]
        rows.flush()

        text = "\n".join(lines) + "\n"
        write_atomically(target.with_suffix(".names.jsonl"), text.encode(errors="replace"))


def _write_parquet(target: Path, blocks: Iterable[Block], n: int, width: int) -> None:
    """The table, a row group a block."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from vlp.files import replacing

    schema = pa.schema([("name", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    with replacing(target) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for names, block in blocks:
            flat = pa.array(block.reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, width)
            printable = [name.encode(errors="replace").decode() for name in names]
            writer.write_table(pa.table([pa.array(printable), lists], schema=schema))
