"""Scores of samples, and the shares of all samples that have the highest ones.

A score is a number in a sample's JSON. It is there already, or comes from stored embeddings (see
`heads`), or is the model's cosine of each caption. A share is of all shards, so its threshold is
known once every shard is surveyed:

    --top FIELD=SHARE   k = ⌊SHARE · n⌋ (at least 1) of the n samples that have a number in FIELD;
                        the threshold is the k-th largest, and all that equal it stay

    DIR/00000_scores.npz   values [n, fields], NaN for none; with --model also every caption's
                           cosine, so that the model runs once
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp.data_tools._run.arrays import load, load_all, save
from vlp.data_tools.filter.conditions import number_of

if TYPE_CHECKING:
    from vlp.data.embedded import Embeddings
    from vlp.data.members import Content
    from vlp.data_tools._encoder import Model
    from vlp.data_tools._run.work import Pool, Result
    from vlp.data_tools.filter.heads import Head

CLIP_SCORES = "clip_scores"  # the field of the model's cosines, one a caption
_NO_CAPTIONS = -1  # in place of their number: the picture does not open, so there is no cosine


@dataclass(frozen=True)
class Stored:
    """Scores that heads give to stored embeddings, by fields of the JSON."""

    embeddings: Embeddings
    heads: tuple[Head, ...]

    @classmethod
    def of(
        cls, folder: str | None, texts: list[str], sources: list[Path], *, without_heads: bool
    ) -> Stored | None:
        """The heads that the options name, on the embeddings of all sources; raises ValueError.

        without_heads: the embeddings serve something else as well.
        """
        from vlp.data.embedded import Embeddings
        from vlp.data.index import index
        from vlp.data_tools.filter.heads import Head

        if not folder and not texts:
            return None
        if not folder or not (texts or without_heads):
            raise ValueError(
                "--embeddings DIR (of `vlp data embed`) and --head NAME=FILE go together: one says "
                "which embeddings, the other what scores them"
            )
        heads = tuple(Head.of(text) for text in texts)
        names = [head.name for head in heads]
        if len(set(names)) < len(names):
            raise ValueError(f"--head is given twice under one name: {', '.join(names)}")

        # Which checks each file: one model, one width, the keys of its shard.
        embeddings = Embeddings(folder, [*map(str, sources)], index(sources), with_text=False)
        for head in heads:
            head.check(embeddings.teacher.width)
        return cls(embeddings, heads)

    def settings(self) -> dict[str, Any]:
        """What the scores depend on."""
        teacher = self.embeddings.teacher
        heads = [head.settings() for head in self.heads]
        return {"heads": heads, "embeddings": [teacher.model, teacher.weights]}

    def names(self) -> set[str]:
        """The fields that the scores are put into."""
        return {head.name for head in self.heads}

    def put(
        self, samples: Iterable[Content], shard: int, counts: Counter[str]
    ) -> Iterator[Content]:
        """A shard's samples, all of them, with their scores in the JSON; a sample without a score
        loses the field. `counts` learns where one stood there. Raises ValueError where they are not
        those that were embedded.
        """
        image = self.embeddings.mapped(shard, "image")
        text = self.embeddings.mapped(shard, "text")
        columns = {head.name: head.scores(image, text) for head in self.heads}

        place = -1
        for place, sample in enumerate(samples):
            if place >= len(image):
                break
            for name, scores in columns.items():
                # Of another head, of an earlier call, or the user's own: it would be taken for
                # this one's.
                if sample.meta.pop(name, None) is not None:
                    counts[f"--head {name}: replaced what the JSON had there"] += 1
                if not np.isnan(scores[place]):
                    sample.meta[name] = float(scores[place])
            yield sample
        if place + 1 != len(image):
            raise ValueError(
                f"shard {shard} of the source holds other samples than {len(image)} embedded ones; "
                "make its embeddings anew with `vlp data embed`"
            )


@dataclass(frozen=True)
class Top:
    """A share of the samples: those with the highest numbers in a field."""

    text: str
    field: str
    share: Fraction

    asks_number = True

    @classmethod
    def of(cls, text: str) -> Top:
        """A share from the command line, .3 or 30%; raises ValueError."""
        field, equals, written = text.rpartition("=")
        number = written.strip()
        try:
            # Exactly as it is written: .3 of 10 is 3.
            share = Fraction(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not (equals and field.strip() and 0 < share < 1):
            raise ValueError(
                f"--top {text!r}: expected FIELD=SHARE with a share between 0 and 1, or between "
                "0% and 100%, such as similarity=0.3 or aesthetic=30%"
            )
        return cls(text, field.strip(), share)

    def can_be_asked(self, meta: dict[str, Any]) -> bool:
        """Whether a sample has a number in the field."""
        return number_of(meta, self.field) is not None

    def threshold(self, values: np.ndarray) -> float:
        """The least value that stays, of all samples' [n] (NaN: none); raises ValueError."""
        numbers = values[~np.isnan(values)]
        if not len(numbers):
            raise ValueError(f"--top {self.text}: no sample has a number in {self.field}")
        n_kept = max(1, int(self.share * len(numbers)))
        place = len(numbers) - n_kept
        return float(np.partition(numbers, place)[place])


@dataclass(frozen=True)
class Survey:
    """The work on one shard: what its samples have in the fields that shares are of."""

    folder: Path
    tops: tuple[Top, ...]
    stored: Stored | None
    model: Model | None  # where a share is of its cosines

    def __call__(self, job: tuple[int, Path]) -> Result:
        from vlp.data_tools._run.shards import samples

        number, path = job
        counts: Counter[str] = Counter()
        scored: Iterable[Content] = samples(path, counts)
        if self.stored:
            scored = self.stored.put(scored, number, counts)
        if self.model:
            scored = with_cosines(self.model, scored, counts)

        values: list[list[float]] = []
        cosines: list[float] = []
        n_captions: list[int] = []
        for sample in scored:
            numbers = [number_of(sample.meta, top.field) for top in self.tops]
            values.append([np.nan if one is None else one for one in numbers])
            of_captions = sample.meta.get(CLIP_SCORES) if self.model else []
            n_captions.append(_NO_CAPTIONS if of_captions is None else len(of_captions))
            cosines += of_captions or []

        arrays = {"values": np.array(values, np.float64).reshape(-1, len(self.tops))}
        if self.model:
            arrays |= {"cosines": np.array(cosines), "n_captions": np.array(n_captions, np.int64)}
        save(_file(self.folder, number), **arrays)
        return {"counts": counts}


@dataclass(frozen=True)
class Shares:
    """The shares with their thresholds; each shard's values are read where it is written."""

    folder: Path
    tops: tuple[Top, ...]
    thresholds: tuple[float, ...]
    with_cosines: bool

    @classmethod
    def of(cls, survey: Survey, n_shards: int) -> Shares:
        """The thresholds over all surveyed shards; raises ValueError."""
        folder = survey.folder
        files = [_file(folder, number) for number in range(n_shards)]
        values = np.concatenate([of_shard["values"] for of_shard in load_all(files)])
        columns = zip(survey.tops, values.T)
        thresholds = tuple(top.threshold(column) for top, column in columns)
        return cls(folder, survey.tops, thresholds, survey.model is not None)

    def lines(self) -> str:
        """The thresholds, for a person."""
        pairs = zip(self.tops, self.thresholds)
        return "\n".join(f"--top {top.text}: {top.field} >= {least:.6g}" for top, least in pairs)

    def put(self, samples: Iterable[Content], shard: int) -> Iterator[tuple[Content, str]]:
        """A shard's samples, all of them, with the survey's cosines in their JSON, and why each is
        not among the highest, or "".
        """
        surveyed = load(_file(self.folder, shard))
        values = surveyed["values"]
        cosines = _of_captions(surveyed) if self.with_cosines else None
        for place, sample in enumerate(samples):
            if place >= len(values):
                raise ValueError(
                    f"shard {shard} of the source changed since it was surveyed; name another "
                    "folder with --to"
                )
            if cosines is not None:
                _put_cosines(sample.meta, cosines[place])
            yield sample, self._refuse(values[place])

    def _refuse(self, values: np.ndarray) -> str:
        for top, value, least in zip(self.tops, values, self.thresholds):
            if np.isnan(value):
                return f"--top {top.text}: no such value"
            if value < least:
                return f"--top {top.text}: not among the highest"
        return ""


def _of_captions(surveyed: dict[str, np.ndarray]) -> list[list[float] | None]:
    """The cosines of each sample's captions; None for a picture that did not open."""
    n_captions = surveyed["n_captions"]
    ends = np.cumsum(np.maximum(n_captions, 0))
    pieces = np.split(surveyed["cosines"], ends[:-1])
    return [
        None if n == _NO_CAPTIONS else piece.tolist()
        for n, piece in zip(n_captions.tolist(), pieces)
    ]


def _put_cosines(meta: dict[str, Any], cosines: list[float] | None) -> None:
    # Those of an earlier call go in any case.
    meta.pop(CLIP_SCORES, None)
    if cosines is not None:
        meta[CLIP_SCORES] = cosines


def surveyed(survey: Survey, sources: list[Path], pool: Pool) -> Shares | None:
    """The shares over all shards; None while other machines still read theirs."""
    from vlp.data_tools._run.shards import jobs
    from vlp.data_tools._run.work import all_done, carry_out

    results = carry_out("scores", jobs(sources, survey.folder, "scores"), survey, pool)
    return Shares.of(survey, len(sources)) if all_done(results) else None


def with_cosines(
    model: Model, samples: Iterable[Content], counts: Counter[str]
) -> Iterator[Content]:
    """The samples with the cosine of each caption in the JSON's clip_scores; without that field
    where the picture does not open.
    """
    for batch, images in model.batches(samples, counts):
        # All captions of a batch in one pass, whoever has them.
        captions = list(chain.from_iterable(sample.captions for sample in batch))
        texts = model.encoder().encode_texts(captions).cpu()
        rows_of_samples = texts.split([len(sample.captions) for sample in batch])

        for sample, image, rows in zip(batch, images, rows_of_samples):
            cosines = [round(cosine, 4) for cosine in (rows @ image).tolist()]
            _put_cosines(sample.meta, cosines if image.any() else None)
            yield sample


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}_scores.npz"
