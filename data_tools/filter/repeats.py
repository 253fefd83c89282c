"""Captions that too many samples have, by a survey of all shards."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data import stored
from vlp.data_tools._run import work

if TYPE_CHECKING:
    import numpy as np


def too_common(sources: list[Path], folder: Path, most: int, pool: work.Pool) -> np.ndarray | None:
    """Sorted hashes of the captions that more than `most` samples have; None while other machines
    still read theirs.
    """
    import numpy as np

    from vlp.data_tools._run.shards import jobs

    survey = jobs(sources, folder, "captions")
    surveyed = work.carry_out("captions", survey, partial(_survey, folder=folder), pool)
    if not work.all_done(surveyed):
        return None

    # Of all parts: machines read their own shards, and each decides for all.
    files = [_hashes(folder, number) for number in range(len(sources))]
    stored.bring(files)
    hashes = [np.load(path) for path in files]
    values, n_samples = np.unique(np.concatenate(hashes), return_counts=True)
    return values[n_samples > most]


def _survey(job: tuple[int, Path], *, folder: Path) -> work.Result:
    import numpy as np

    from vlp.data_tools._run.shards import samples
    from vlp.files import write_atomically

    number, path = job
    counts: Counter[str] = Counter()
    hashes: list[np.uint64] = []
    for sample in samples(path, counts):
        # A set: a caption that a sample has twice is still one sample's.
        hashes.extend({hash_of(caption) for caption in sample.captions})

    file = io.BytesIO()
    np.save(file, np.array(hashes, np.uint64))
    write_atomically(_hashes(folder, number), file.getvalue())
    return {"counts": counts}


def _hashes(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}_captions.npy"


def hash_of(caption: str) -> np.uint64:
    """64 bits of a caption's words, whatever its capitals and punctuation."""
    import numpy as np

    from vlp.data_tools._english.words import bare

    # Eight bytes a caption: of a billion captions, a few hundred pairs meet by chance.
    digest = hashlib.blake2b(bare(caption).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))
