"""What becomes of a shard: its concepts counted, and written into its samples.

DIR/00000_named.npz    concepts that a shard's captions name: words, and n_samples that do
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlp.data.row_numbers import MOST_CONCEPTS
from vlp.data_tools._run.arrays import load_all, save
from vlp.data_tools.concepts.wordnet import Nouns

if TYPE_CHECKING:
    from vlp.data.members import Content
    from vlp.data_tools._run.shards import Changed
    from vlp.data_tools._run.work import Result


@dataclass(frozen=True)
class Count:
    """The work on one shard: how many of its samples name each concept."""

    folder: Path
    nouns: Nouns

    def __call__(self, job: tuple[int, Path]) -> Result:
        from vlp.data_tools._run.shards import samples

        number, path = job
        counts: Counter[str] = Counter()
        n_samples: Counter[str] = Counter()
        for sample in samples(path, counts):
            n_samples.update(named(sample, self.nouns))

        words = sorted(n_samples)
        save(
            named_file(self.folder, number),
            words=np.array([word.encode() for word in words], np.bytes_),
            n_samples=np.array([n_samples[word] for word in words], np.int64),
        )
        return {"counts": counts}


@dataclass(frozen=True)
class Label:
    """The change of a shard's samples (see `vlp.data_tools._run.shards.Change`)."""

    nouns: Nouns
    numbers: dict[str, int]  # of each concept's word

    def __call__(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Changed]:
        from vlp.data_tools._run.shards import Changed

        for sample in samples:
            concepts = [
                self.numbers[word] for word in named(sample, self.nouns) if word in self.numbers
            ]
            counts["samples with a concept" if concepts else "samples without a concept"] += 1
            # Else the report would show a line of 0.
            if n_beyond := len(concepts[MOST_CONCEPTS:]):
                counts[f"concepts left out: beyond {MOST_CONCEPTS} of a sample"] += n_beyond

            # Weights that were given were of other concepts.
            meta = {name: value for name, value in sample.meta.items() if name != "concept_weights"}
            meta["concepts"] = concepts[:MOST_CONCEPTS]
            yield Changed(sample, list(sample.captions), meta)


def named(sample: Content, nouns: Nouns) -> list[str]:
    """The words of the concepts that a sample's captions name, each once, in their order."""
    words = (word for caption in sample.captions for word in nouns.in_caption(caption))
    return list(dict.fromkeys(words))


def named_file(folder: Path, number: int) -> Path:
    """Where a shard's concepts lie, counted."""
    return folder / f"{number:05d}_named.npz"


def totals(files: Iterable[Path]) -> Counter[str]:
    """How many samples of all shards name each concept."""
    total: Counter[str] = Counter()
    for counted in load_all(files):
        words = [word.decode() for word in counted["words"].tolist()]
        total.update(dict(zip(words, counted["n_samples"].tolist())))
    return total
