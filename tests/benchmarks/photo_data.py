"""Photos with captions, split by picture for photos.py: to train on, to test on, and what a caption
is asked to be told from.

    OUT/photos/0/train      captions with negatives by rule, and with other numbers where they count
    OUT/photos/0/test       pictures of this fold alone: retrieval, and captions against negatives
    OUT/photos/0/numbers    its captions that count, against themselves with the eight other numbers
    OUT/photos/0/choices    its captions against given wrong ones (SugarCrepe's)

Equal pictures, and variations of one (`origin`), are always in the same fold. Of few photos every
fold is tested once, by models that were trained on the others; of many one part in ten is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks import evidence_data
from vlp.data.format import ShardWriter
from vlp.data.members import Content
from vlp.data.paths import expand
from vlp.data_tools._english import numbers
from vlp.data_tools._run.shards import samples

FEW, FOLDS = 2000, 3  # photos below which all are tested, in so many folds
PARTS = 10  # of more photos, of which the first is tested
Choices = dict[str, list[tuple[str, str]]]  # image -> captions, each with a wrong one


def make(photos: Path, choices: Choices, to: Path) -> dict[str, Any]:
    """Split the photos, unless that was done; returns what was made of them.

    ValueError for a folder without photos, and where `to` was made of others.
    """
    shards = list(expand(str(photos)))
    origin = {"photos": str(photos), "bytes": sum(Path(shard).stat().st_size for shard in shards)}
    if not to.exists():
        evidence_data.whole(to, lambda part: _split(photos, choices, part, origin))
    made = about(to)
    if {key: made[key] for key in origin} != origin:
        raise ValueError(
            f"{to} was made of {made['photos']} ({made['bytes']:,} bytes), and asked for is "
            f"{photos} ({origin['bytes']:,}); remove it or choose another --out"
        )
    return made


def about(folder: Path) -> dict[str, Any]:
    """What `make` made a folder of. ValueError where it has not."""
    path = folder / "about.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no folds yet; call this once without --table")
    return json.loads(path.read_text())


def _split(photos: Path, choices: Choices, to: Path, origin: dict[str, Any]) -> None:
    negatives = to / "negatives"
    evidence_data.vlp("negatives", str(photos), "--to", str(negatives), "--k", "2")

    n_photos = sum(1 for _ in contents(negatives))
    n_parts = FOLDS if n_photos < FEW else PARTS
    tested = range(FOLDS) if n_photos < FEW else range(1)
    counts: Counter[str] = Counter(photos=n_photos)
    for fold in tested:
        counts += write_fold(negatives, choices, to, fold, n_parts)
    made = origin | {"folds": list(tested), "parts": n_parts, "counts": counts}
    (to / "about.json").write_text(json.dumps(made, indent=1))


def write_fold(source: Path, choices: Choices, to: Path, fold: int, n_parts: int) -> Counter[str]:
    """Write a fold's four sets; returns what of it is tested."""
    counts: Counter[str] = Counter()
    written: dict[str, list[tuple[Content, list[str], dict[str, Any]]]] = defaultdict(list)
    with ShardWriter(to / str(fold) / "train") as train:
        for sample in contents(source):
            captions = list(sample.captions)
            if part_of(sample, n_parts) != fold:
                _add(train, sample, captions, sample.meta | counting(captions, "counterfactuals"))
                continue
            counts.update(test_photos=1, test_captions=len(captions))
            written["test"].append((sample, captions, sample.meta))

            other_numbers = counting(captions, "negatives")
            if other_numbers["negatives"]:
                written["numbers"].append((sample, captions, other_numbers))
                counts.update(number_photos=1)
                counts.update(number_captions=len(set(other_numbers["negatives_of"])))
            for pair in choices.get(str(sample.meta.get("image")), []):
                written["choices"].append((sample, [pair[0]], {"texts": list(pair)}))
                counts.update(choices=1)

    for name, entries in written.items():
        with ShardWriter(to / str(fold) / name) as writer:
            for sample, captions, meta in entries:
                _add(writer, sample, captions, meta)
    return counts


def contents(folder: Path) -> Iterator[Content]:
    """All samples of a folder of shards."""
    for shard in expand(str(folder)):
        yield from samples(Path(shard), Counter())


def part_of(sample: Content, n_parts: int) -> int:
    """The part that a picture belongs to, by its origin, else by its bytes."""
    named = str(sample.meta["origin"]).encode() if "origin" in sample.meta else sample.image
    return int.from_bytes(hashlib.sha256(named).digest()[:8], "big") % n_parts


def counting(captions: Iterable[str], name: str) -> dict[str, list[Any]]:
    """The captions that count something, with the other numbers from two to ten: texts, and the
    place of the caption of each, as the JSON's `name` and `name`_of.
    """
    texts: list[str] = []
    of: list[int] = []
    for place, caption in enumerate(captions):
        exact, _ = numbers.counts(caption)
        # Of two different numbers it would be open which one is wrong.
        if len({count.value for count in exact}) == 1:
            other = numbers.counterfactuals(caption, exact)
            texts += other
            of += [place] * len(other)
    return {name: texts, f"{name}_of": of}


def commonest_number(shards: list[Path]) -> float:
    """The share of the captions that count whose number is the commonest of all: what they score
    who name it without a look at the picture.
    """
    values: Counter[int] = Counter()
    for folder in shards:
        for sample in contents(folder):
            for place in set(sample.meta["negatives_of"]):
                exact, _ = numbers.counts(sample.captions[place])
                values[exact[0].value] += 1
    return max(values.values()) / values.total()


def sentences_that_count(shards: Path, to: Path) -> dict[str, int]:
    """Every different caption that counts, beside the first picture that it is true of, as a set
    of choices of other numbers; returns how many.
    """
    met: set[str] = set()
    counts: Counter[str] = Counter()
    with ShardWriter(to) as writer:
        for sample in contents(shards):
            captions = [text for text in sample.captions if text not in met]
            met.update(captions)
            other_numbers = counting(captions, "negatives")
            counts.update(sentences=len(captions))
            if other_numbers["negatives"]:
                _add(writer, sample, captions, other_numbers)
                counts.update(counting=len(set(other_numbers["negatives_of"])))
    return dict(counts)


def read_choices(table: Path) -> Choices:
    """SugarCrepe's items by image."""
    choices: Choices = defaultdict(list)
    for line in table.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        choices[row["image"]].append((row["caption"], row["negative_caption"]))
    return dict(choices)


def _add(writer: ShardWriter, sample: Content, captions: list[str], meta: dict[str, Any]) -> None:
    kept = {key: value for key, value in meta.items() if key not in ("key", "captions")}
    writer.add(None, sample.image, sample.image_type, captions, kept)
