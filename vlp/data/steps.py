"""One rank's rows of a step: read, decode, crop, choose captions, tokenize → `Batch`. Runs in the
loader processes.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlp.config import Data
from vlp.data import decode, text, wrong_captions
from vlp.data.mix import Mixture
from vlp.data.sources import Source
from vlp.data.wording import vary
from vlp.data.wrong_captions import WrongCaptions
from vlp.seeds import derive
from vlp.types import Batch, ImageSpec, Sample, TextSpec

_TRIES = 64  # stand-ins for one bad sample before the data is called unusable


class DataError(RuntimeError):
    """The data cannot be trained on: too many bad samples, a stalled shard, or a resumed run on
    other data.
    """


@dataclass
class Report:
    """What happened while one batch was made."""

    bad: list[tuple[int, str, str]]  # sample id, key where known, reason
    n_truncated: int


@dataclass(frozen=True)
class Row:
    """The sample of a row, and which of its captions stands there."""

    sample: Sample
    caption: str

    def wrong(self, field: str) -> tuple[WrongCaptions, list[int]]:
        """The sample's `negatives` or `counterfactuals`, and the places of those that belong to the
        row's caption.
        """
        found = wrong_captions.read(self.sample.meta, field, self.sample.captions)
        return found, found.of(self.caption)

    def negative_image(self) -> bytes:
        """The image of the row's first negative; that of another caption's negative is none of this
        row's.
        """
        _, places = self.wrong("negatives")
        return self.sample.negative_image if places[:1] == [0] else b""


def optional_fields(sources: list[Source], data: Data) -> dict[str, int]:
    """The optional fields of the batches, with their width."""
    fields: dict[str, int] = {}
    if k := max(source.n_negatives for source in sources):
        fields |= {"negatives": k, "negatives_valid": k}
        if any(source.pictured for source in sources):
            fields["negative_image"] = 1
    if c := max(source.n_counterfactuals for source in sources):
        fields |= {"counterfactual": c, "counterfactual_valid": c}
    labels = frozenset.intersection(*(source.labels for source in sources))
    if "score" in labels:
        fields["score"] = 1
    if "negative_scores" in labels and "negatives" in fields:
        fields["teacher_scores"] = k
    if "concepts" in labels:
        fields["concept_targets"] = len(sources[0][0].meta["concepts"])
    if all(source.embeddings for source in sources):
        width = sources[0].embeddings.teacher.width
        fields["teacher_image"] = width
        if all(source.embeddings.with_text for source in sources):
            fields["teacher_text"] = width
    if data.views:
        fields |= {"image_views": data.views.n, "text_views": data.views.n}
    return fields


def read_fields(fields: dict[str, int], reads: frozenset[str]) -> dict[str, int]:
    """Those of `optional_fields` that are worth making where only `reads` are read.

    A bad score costs its sample only where a term reads scores; hard captions are tokenized only
    where they are read.
    """
    unread = {"score", "teacher_scores", "concept_targets"} - reads
    for family in ("negative", "counterfactual"):
        if not any(
            family in name
            for name in reads | ({"negatives"} if "teacher_scores" in reads else set())
        ):
            unread |= {name for name in fields if name.startswith(family)}
    return {name: width for name, width in fields.items() if name not in unread}


class Steps(Dataset):
    """Item s: this rank's rows of step s, with a report. Sent to every loader process."""

    def __init__(
        self,
        mixture: Mixture,
        data: Data,
        image: ImageSpec,
        text: TextSpec,
        batch: int,
        rank: int,
        world: int,
        optional: dict[str, int],
        pixels: bool,
    ) -> None:
        self.pixels = pixels
        self.mixture, self.data, self.image, self.text, self.optional = (
            mixture,
            data,
            image,
            text,
            optional,
        )
        self.size, self.rows = batch, range(rank * batch // world, (rank + 1) * batch // world)
        self.ahead = mixture.ahead(batch)
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_tokenizer": None,
        }  # each process builds its own: its caches are large

    def __getitem__(self, step: int) -> tuple[Batch, Report]:
        self._tokenizer = self._tokenizer or text.build(self.text)
        ids, places = self.mixture.batch(step, self.size), self.mixture.captions(step, self.size)
        if self.ahead:
            self.mixture.prepare(self.mixture.batch(step + self.ahead, self.size))
        report = Report([], 0)
        pictures = self._new_pictures()
        rows = [
            self._row(
                step, row, ids, places, {name: rows[i] for name, rows in pictures.items()}, report
            )
            for i, row in enumerate(self.rows)
        ]
        captions = [row.caption for row in rows]
        samples = [row.sample for row in rows]
        tokens, report.n_truncated = self._tokenizer.tokenize(captions)
        optional = {
            **pictures,
            **self._labels(rows, step),
            **self._text_views(captions, samples, step),
        }
        ids = torch.tensor([sample.sample_id for sample in samples])
        return Batch(
            text=tokens, sample_id=ids, key=[sample.key for sample in samples], **optional
        ), report

    @property
    def nbytes(self) -> int:
        """Bytes of one item's tensors, near enough to find room for them."""
        pixels = sum(math.prod(shape) for shape in self._picture_shapes().values())
        widths = self.optional
        n_texts = 1 + sum(
            widths.get(name, 0) for name in ("negatives", "counterfactual", "text_views")
        )
        n_numbers = sum(
            widths.get(name, 0) for name in ("teacher_image", "teacher_text", "concept_targets")
        )
        return len(self.rows) * (pixels + 8 * self.text.context_length * n_texts + 4 * n_numbers)

    def _new_pictures(self) -> dict[str, Tensor]:
        """Uninitialised rows of the fields that hold pictures."""
        if not self.pixels:
            return {"image": torch.empty(len(self.rows), 3, 0, 0, dtype=torch.uint8)}
        return {
            name: _new_pixels((len(self.rows), *shape))
            for name, shape in self._picture_shapes().items()
        }

    def _picture_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each field that holds pictures."""
        if not self.pixels:
            return {}
        shapes: dict[str, tuple[int, ...]] = {"image": (3, *self.image.size)}
        if "negative_image" in self.optional:
            shapes["negative_image"] = shapes["image"]
        if "image_views" in self.optional:
            shapes["image_views"] = (self.optional["image_views"], *shapes["image"])
        return shapes

    def _row(
        self,
        step: int,
        row: int,
        ids: np.ndarray,
        places: np.ndarray | None,
        out: dict[str, Tensor],
        report: Report,
    ) -> Row:
        """The sample of this row, or its first usable stand-in, with its pictures written to `out`.

        `places` [B]: which caption of its sample stands in each row, where the mixture draws them;
        a stand-in's is chosen.
        """
        wanted = int(ids[row])
        stand_ins = self.mixture.replacements(wanted, step, row, ids)
        for sample_id in itertools.chain([wanted], itertools.islice(stand_ins, _TRIES)):
            key = ""
            try:
                sample = self.mixture.read(sample_id)
                key = sample.key
                self._check_numbers(sample)
                drawn = places is not None and sample_id == wanted
                chosen = Row(
                    sample,
                    sample.captions[places[row]] if drawn else self._caption(sample, step, row),
                )
                self._draw(chosen, step, row, out)
                return chosen
            except (OSError, ValueError) as error:
                report.bad.append((sample_id, key, f"{type(error).__name__}: {error}"))
        raise DataError(
            f"sample {wanted} and {_TRIES} stand-ins of its source are all bad; the last: {report.bad[-1]}"
        )

    def _check_numbers(self, sample: Sample) -> None:
        """Raise ValueError for numbers that a term reads and cannot use: they cost their sample,
        not the run.
        """
        if "score" in self.optional:
            _relevance(sample)
        if "teacher_scores" in self.optional:
            negatives = wrong_captions.read(sample.meta, "negatives", sample.captions)
            if negatives.texts:
                _numbers(sample, "negative_scores", len(negatives.texts))
        if c := self.optional.get("concept_targets", 0):
            _numbers(sample, "concepts", c)

    def _draw(self, chosen: Row, step: int, row: int, out: dict[str, Tensor]) -> None:
        """Write the row's pictures; raises ValueError for one that cannot be decoded."""
        if not self.pixels:
            return
        sample = chosen.sample

        def chance(purpose: str, *position: int) -> random.Random:
            return random.Random(self._seed(purpose, step, row, sample.sample_id, *position))

        augment, views = self.data.augment, self.data.views
        if views is None:
            out["image"].copy_(
                decode.train_transform(sample.image, self.image, augment, chance("pixels"))
            )
        else:
            image = decode.decode(
                sample.image, self.image.decoding
            )  # once for all views, so at full size
            out["image"].copy_(decode.random_crop(image, self.image, augment, chance("pixels")))
            for v, view in enumerate(out["image_views"]):
                view.copy_(decode.random_crop(image, self.image, views.augment, chance("view", v)))
        if "negative_image" in out:
            out["negative_image"].zero_()
            if negative := chosen.negative_image():
                out["negative_image"].copy_(
                    decode.train_transform(negative, self.image, augment, chance("negative"))
                )

    def _seed(self, purpose: str, *position: int) -> int:
        return derive(self.mixture.seed, purpose, *position)

    def _caption(self, sample: Sample, step: int, row: int) -> str:
        captions, config = sample.captions, self.data.captions
        if config.choose == "first" or len(captions) == 1:
            return captions[0]
        seed = self._seed("caption", step, row, sample.sample_id)
        if sample.weights:
            return random.Random(seed).choices(captions, sample.weights)[0]
        if config.choose == "weights":
            offered = captions[: len(config.weights)]
            return random.Random(seed).choices(offered, config.weights[: len(offered)])[0]
        return captions[seed % len(captions)]

    def _labels(self, rows: list[Row], step: int) -> dict[str, Tensor]:
        """The optional fields that come from the samples' JSON or lie beside them."""
        result, samples = self._wrong_captions(rows, step), [row.sample for row in rows]
        if "score" in self.optional:
            result["score"] = torch.tensor(
                [_relevance(sample) for sample in samples], dtype=torch.float32
            )
        if c := self.optional.get("concept_targets", 0):
            lists = [_numbers(sample, "concepts", c) for sample in samples]
            result["concept_targets"] = torch.tensor(lists, dtype=torch.float32)
        for i, name in enumerate(("teacher_image", "teacher_text")):
            if name in self.optional:
                rows = np.stack([sample.embeddings[i] for sample in samples])
                result[name] = torch.from_numpy(rows.astype(np.float32))
        return result

    def _wrong_captions(self, rows: list[Row], step: int) -> dict[str, Tensor]:
        """Hard negatives and counterfactuals of the rows' captions, and what goes with them."""
        result: dict[str, Tensor] = {}
        if k := self.optional.get("negatives", 0):
            texts, valid, scores = zip(*(self._negatives(row, k) for row in rows))
            result["negatives"] = self._tokens(texts)
            result["negatives_valid"] = torch.tensor(valid)
            if "negative_image" in self.optional:
                result["negatives_valid"][:, 0] &= torch.tensor(
                    [bool(row.negative_image()) for row in rows]
                )
            if "teacher_scores" in self.optional:
                result["teacher_scores"] = torch.tensor(scores, dtype=torch.float32)
        if c := self.optional.get("counterfactual", 0):
            texts = [
                self._counterfactuals(row, c, step, number) for row, number in zip(rows, self.rows)
            ]
            result["counterfactual"] = self._tokens(texts)
            result["counterfactual_valid"] = torch.tensor([any(row) for row in texts])
        return result

    def _negatives(self, row: Row, k: int) -> tuple[list[str], list[bool], list[float]]:
        """K texts, which of them count, and a teacher's scores of them; padded where the caption
        has fewer.
        """
        negatives, places = row.wrong("negatives")
        scores = [0.0] * len(negatives.texts)
        if "teacher_scores" in self.optional and places:
            scores = _numbers(row.sample, "negative_scores", len(negatives.texts))

        places, missing = places[:k], k - len(places[:k])
        return (
            [negatives.texts[i] for i in places] + [""] * missing,
            [negatives.valid[i] for i in places] + [False] * missing,
            [scores[i] for i in places] + [0.0] * missing,
        )

    def _counterfactuals(self, row: Row, c: int, step: int, number: int) -> list[str]:
        """C texts of the row's caption, or C empty ones; fewer are repeated, so that a valid row
        has C real texts.

        Which one comes first, which is all that a loss of one counterfactual sees, is drawn anew at
        each visit.
        """
        wrong, places = row.wrong("counterfactuals")
        own = [wrong.texts[i] for i in places if wrong.valid[i]]
        if not own:
            return [""] * c
        first = self._seed("counterfactual", step, number, row.sample.sample_id) % len(own)
        return [own[(first + i) % len(own)] for i in range(c)]

    def _text_views(
        self, captions: list[str], samples: list[Sample], step: int
    ) -> dict[str, Tensor]:
        views = self.data.views
        if views is None:
            return {}
        seeds = [(step, row, sample.sample_id) for row, sample in zip(self.rows, samples)]
        texts = [
            [
                vary(caption, views.text, random.Random(self._seed("wording", *seed, v)))
                for v in range(views.n)
            ]
            for caption, seed in zip(captions, seeds)
        ]
        return {"text_views": self._tokens(texts)}

    def _tokens(self, rows: Sequence[list[str]]) -> Tensor:
        flat = self._tokenizer([text for row in rows for text in row])
        return flat.view(len(rows), -1, flat.shape[-1])


def _relevance(sample: Sample) -> float:
    score = _finite(sample.meta["score"])
    if score is None or score < 0:
        raise ValueError(
            f"the score is {str(sample.meta['score'])[:20]}, expected a number >= 0 and below 3e38"
        )
    return score


def _numbers(sample: Sample, field: str, count: int) -> list[float]:
    values = [_finite(value) for value in sample.meta[field]]
    if len(values) != count:
        raise ValueError(
            f"{len(values)} numbers in {field!r}, expected {count}: one for each "
            f"{'of its negatives' if field == 'negative_scores' else 'concept, as the first sample has'}"
        )
    if None in values:
        raise ValueError(
            f"a number in {field!r} is {str(sample.meta[field][values.index(None)])[:20]}, expected a finite one"
        )
    return values


def _finite(value: float) -> float | None:
    """A number of a JSON that float32 can hold, else None."""
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < 3e38 else None  # not NaN


def _new_pixels(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a loader process already in the shared memory through which it will
    travel: one copy less.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(
        math.prod(shape)
    )  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
