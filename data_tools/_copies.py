"""The files of `vlp data dedup`: fingerprints of every shard, the decision about all of them, and what follows for a shard."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from vlp.data_tools._near import FINGERPRINT, Limits, decide, fingerprint
from vlp.data_tools._pictures import rgb
from vlp.data_tools._shards import Changed, samples
from vlp.data_tools._work import Result
from vlp.files import write_atomically

if TYPE_CHECKING:
    from vlp.data.members import Content


def survey(job: tuple[int, Path], *, folder: Path) -> Result:
    """The fingerprints of a shard's pictures, in a file beside the mark."""
    number, path = job
    counts, keys, prints = Counter(), [], []
    for sample in samples(path, counts):
        keys.append(sample.key)
        try:
            prints.append((*fingerprint(rgb(sample.image, 64)), True))
        except ValueError:
            counts["unreadable: pictures"] += 1
            prints.append((0, np.zeros(48, np.uint8), False))
    _save(_prints(folder, number), np.array(prints, FINGERPRINT))
    return {"counts": counts, "samples": len(keys), "keys": hashlib.sha256("\n".join(keys).encode()).hexdigest()}


def _prints(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}_fingerprints.npy"


def decided(
    folder: Path, paths: list[Path], n_against: int, surveyed: list[Result], embeddings: list[str], limits: Limits
) -> list[np.ndarray]:
    """A shard: for each sample the number, over all `paths`, of the one that it is a copy of, −1 where it stays.

    Decided once and kept in `folder`, with copies.jsonl for people. Raises ValueError.
    """
    sizes = [result["samples"] for result in surveyed]
    ends, kept = np.cumsum(sizes), folder / "_copies.npy"
    if not kept.exists():
        prints = np.concatenate([np.load(_prints(folder, number)) for number in range(len(paths))])
        pieces = _embedded(paths, surveyed, embeddings) if embeddings else []
        copy_of, cosines = decide(prints, pieces, sum(sizes[:n_against]), limits)
        lines = _told(copy_of, cosines, lambda sample: _place(sample, paths, ends))
        write_atomically(folder / "copies.jsonl", "".join(lines).encode())
        _save(kept, copy_of)
    return np.split(np.load(kept), ends[:-1])


def _told(copy_of: np.ndarray, cosines: np.ndarray, place: Callable[[int], dict[str, Any]]) -> Iterator[str]:
    for sample in np.flatnonzero(copy_of >= 0):
        by = "hash" if np.isnan(cosines[sample]) else f"cosine {cosines[sample]:.3f}"
        yield json.dumps({**place(sample), "copy_of": place(copy_of[sample]), "by": by}, ensure_ascii=False) + "\n"


def _place(sample: int, paths: list[Path], ends: np.ndarray) -> dict[str, Any]:
    shard = int(np.searchsorted(ends, sample, "right"))
    return {"shard": str(paths[shard]), "sample": int(sample - (ends[shard - 1] if shard else 0))}


def _save(path: Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    write_atomically(path, file.getvalue())


def _embedded(paths: list[Path], surveyed: list[Result], folders: list[str]) -> list[np.ndarray]:
    """Each shard's picture embeddings [n, D], mapped from disk; raises ValueError for a shard that has none or others."""
    pieces, models = [], set()
    for path, result in zip(paths, surveyed):
        for folder in folders:
            file = Path(folder) / f"{path.stem}.safetensors"
            if not file.exists():
                continue
            with safe_open(file, "numpy") as opened:
                about = opened.metadata()
                if about["keys"] == result["keys"]:
                    pieces.append(opened.get_tensor("image"))
                    models.add(about["model"])
                    break
        else:
            raise ValueError(f"{path} has no embeddings of its samples in {', '.join(folders)}; `vlp data embed` makes them")
    if len(models) > 1:
        raise ValueError(f"the embeddings are of several models ({', '.join(sorted(models))}); embed all shards with one")
    return pieces


@dataclass(frozen=True)
class DropCopies:
    """The change of a shard's samples (see `vlp.data_tools._shards.Change`)."""

    copy_of: list[np.ndarray]  # a shard: for each sample what it is a copy of, −1 where it stays
    n_fixed: int  # samples of --against

    def __call__(self, samples: Iterable[Content], shard: int, counts: Counter[str]) -> Iterator[Changed]:
        for sample, other in zip(samples, self.copy_of[shard]):
            if other < 0:
                yield Changed(sample, list(sample.captions), sample.meta)
            else:
                counts["dropped: held by --against" if other < self.n_fixed else "dropped: copies of an earlier sample"] += 1
