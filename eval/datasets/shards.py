"""Evaluation sets in tars: shards as training reads them, and clip_benchmark's layout of them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlp.data.captions import Choice, form_of
from vlp.data.rows import Shard
from vlp.data.scan import Found, read
from vlp.data.without_text import unread_texts
from vlp.eval import classes
from vlp.eval.datasets.source import Record, Source
from vlp.eval.pictures import DataError, Picture


def clip_benchmark(root: Path, split: str, choice: Choice, missing: str) -> Source:
    """The layout of clip_benchmark 1.6 (`webdataset_builder.convert_dataset`, read by
    `datasets.builder.build_wds_dataset`).
    """
    text = (root / split / "nshards.txt").read_text().strip()
    if not text.isdigit():
        raise DataError(
            f"{root / split / 'nshards.txt'} holds {text!r}, expected the number of shards"
        )

    tars = [root / split / f"{i}.tar" for i in range(int(text))]
    absent = [str(tar) for tar in tars if not tar.exists()]
    if absent:
        raise DataError(
            f"nshards.txt announces {len(tars)} shards but {len(absent)} are not there: "
            f"{', '.join(absent[:5])}"
        )

    # Where the classes are listed, labels are numbers of that list; several labels are an array.
    names = class_names(root)
    kind = (_lines(root / "dataset_type.txt") or [""])[0]
    prefer = "cls" if names else "class"
    if kind == "multilabel":
        prefer = "npy"
    source = from_tars(root, tars, choice, missing, prefer)
    return replace(
        source,
        classes=names,
        templates=_lines(root / "zeroshot_classification_templates.txt"),
        multilabel=kind == "multilabel",
    )


def class_names(root: Path) -> list[str] | None:
    """The names in classnames.txt, by class number; None where there is no such file."""
    path = root / "classnames.txt"
    return classes.read_list(path).names if path.exists() else None


def _lines(path: Path) -> list[str] | None:
    """The lines of a text that are not blank; None where there is no such file."""
    if not path.exists():
        return None
    lines = path.read_text("utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


def from_tars(
    root: Path, tars: list[Path], choice: Choice, missing: str, prefer: str = "class"
) -> Source:
    """The samples that training finds in the same tars. `choice`: which of their texts are
    captions.

    `prefer`: which label counts where a sample has several, its class's number (cls), its name
    (class) or its array (npy). What training leaves out is refused here, unless `missing` is
    "skip": a score is over the whole set.
    """
    records: list[Record] = []
    skipped: list[str] = []
    text_names: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    problems: list[str] = []
    for tar in tars:
        samples, shard, left_out = samples_of(tar, missing)
        skipped += left_out
        passed_over.update(shard.left_out)
        problems += [f"{tar}: {problem}" for problem in shard.problems]
        for sample in samples:
            text_names.update(form_of(sample.content.meta, sample.content.text).keys())
            records.append(_record(tar, sample, choice, prefer))

    # A chosen text that no sample has would silently leave every image without a caption.
    n_with = {name.removeprefix("."): n for name, n in text_names.items()}
    try:
        choice.check(n_with, len(records), str(root))
    except ValueError as error:
        raise DataError(str(error)) from None
    unread = unread_texts(passed_over, problems)
    return Source(str(root), records, skipped=skipped, unread=unread)


def samples_of(tar: Path, missing: str) -> tuple[list[Found], Shard, list[str]]:
    """The samples of a tar, what else is in it, and a line for each that is left out; a DataError
    names them unless they may be.
    """
    # The same reader as in training: evaluation must not see other samples than it would.
    samples: list[Found] = []

    def begin(_: Shard) -> Callable[[Found], None]:
        samples.clear()
        return samples.append

    try:
        shard = read(tar, begin, also=frozenset({"npy"}))
    except ValueError as error:
        raise DataError(str(error)) from None

    n_lost = shard.n_left_out or shard.n_damaged
    if n_lost and missing == "error":
        raise DataError(
            f"{tar}: {'; '.join(shard.problems[:5])}; repair the tar, or write it anew without "
            "these samples, or pass missing=skip to evaluate without them "
            "(the score is then not comparable)"
        )
    return samples, shard, [f"{tar}: left out"] * n_lost


def _record(tar: Path, sample: Found, choice: Choice, prefer: str) -> Record:
    """A sample of a tar as an evaluation record; its picture stays where it is."""
    content, image = sample.content, sample.members["image"]
    picture = member_of(tar, image)

    # A sample may carry both its class's number and its name.
    other = "class" if prefer == "cls" else "cls"
    label = content.meta.get(prefer, content.meta.get(other))
    meta = content.meta
    if "npy" in sample.members:
        values = _array(member_of(tar, sample.members["npy"]))
        meta = {**meta, "npy": values.tolist()}
        # Beside a class it says what else is known of the picture, as in the shards of WILDS.
        if label is None or prefer == "npy":
            label = tuple(values.nonzero()[0].tolist())

    # A sample with neither caption nor label, and with notes of why, is broken.
    captions = choice.captions(content.meta, content.text)
    if not captions and label is None and content.notes:
        raise DataError(f"sample {content.key!r} in {tar}: {'; '.join(content.notes)}")
    return Record(picture, captions, label, meta)


def member_of(tar: Path, member: Any) -> Picture:
    """A file of a sample, where it lies in the tar."""
    return Picture(f"{tar}:{member.name}", str(tar), member.offset, member.size)


def _array(member: Picture) -> Any:
    """The array of a sample: multi-hot labels, as clip_benchmark stores several, or metadata."""
    import numpy as np

    return np.load(io.BytesIO(member.read()), allow_pickle=False)
