"""The fingerprints of a shard's pictures."""

from __future__ import annotations

import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlp.data.picture import BadImage, rgb
from vlp.data_tools._run.shards import samples
from vlp.data_tools._run.work import Result
from vlp.data_tools.dedup import arrays
from vlp.data_tools.dedup.near import FINGERPRINT, fingerprint

if TYPE_CHECKING:
    from vlp.data.members import Content


def survey(job: tuple[int, Path], *, folder: Path) -> Result:
    """The fingerprints of a shard's pictures, in a file beside the mark."""
    number, path = job
    counts: Counter[str] = Counter()
    prints = []
    seen = 0
    for sample in samples(path, counts):
        seen = with_sample(seen, sample)
        # Small: the hash looks at 32 × 32 pixels, and a JPEG is then decoded in less time.
        try:
            prints.append((*fingerprint(rgb(sample.image, side=64)), True))
        except BadImage:
            counts["unreadable: pictures"] += 1
            prints.append((0, np.zeros(48, np.uint8), False))

    arrays.save(prints_file(folder, number), np.array(prints, FINGERPRINT))
    return {"counts": counts, "samples": len(prints), "seen": seen}


def with_sample(seen: int, sample: Content) -> int:
    """A check sum over the samples of a shard, with one more: their keys and pictures, in order."""
    return zlib.crc32(sample.image, zlib.crc32(sample.key.encode(), seen))


def prints_file(folder: Path, number: int) -> Path:
    """Where the fingerprints of a shard lie."""
    return folder / f"{number:05d}_fingerprints.npy"
