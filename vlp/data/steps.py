"""One rank's rows of a step: read, decode, crop, choose captions, tokenize → `Batch`. Runs in the loader processes."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlp.config import Data
from vlp.data import decode, text
from vlp.data.mix import Mixture
from vlp.data.sources import Source, text_list
from vlp.data.wording import vary
from vlp.seeds import derive
from vlp.types import Batch, ImageSpec, Sample, TextSpec

_TRIES = 64  # stand-ins for one bad sample before the data is called unusable


class DataError(RuntimeError):
    """The data cannot be trained on: too many bad samples, a stalled shard, or a resumed run on other data."""


@dataclass
class Report:
    """What happened while one batch was made."""

    bad: list[tuple[int, str, str]]  # sample id, key where known, reason
    n_truncated: int


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


class Steps(Dataset):
    """Item s: this rank's rows of step s, with a report. Sent to every loader process."""

    def __init__(
        self, mixture: Mixture, data: Data, image: ImageSpec, text: TextSpec, batch: int, rank: int, world: int,
        optional: dict[str, int], pixels: bool,
    ) -> None:  # fmt: skip
        self.pixels = pixels
        self.mixture, self.data, self.image, self.text, self.optional = mixture, data, image, text, optional
        self.size, self.rows = batch, range(rank * batch // world, (rank + 1) * batch // world)
        self.ahead = mixture.ahead(batch)
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}  # each process builds its own: its caches are large

    def __getitem__(self, step: int) -> tuple[Batch, Report]:
        self._tokenizer = self._tokenizer or text.build(self.text)
        ids, places = self.mixture.batch(step, self.size), self.mixture.captions(step, self.size)
        if self.ahead:
            self.mixture.prepare(self.mixture.batch(step + self.ahead, self.size))
        report = Report([], 0)
        pictures = self._new_pictures()
        samples, captions = [], []
        for i, row in enumerate(self.rows):
            sample = self._sample(step, row, ids, {name: rows[i] for name, rows in pictures.items()}, report)
            drawn = places is not None and sample.sample_id == ids[row]  # not for a stand-in
            captions.append(sample.captions[places[row]] if drawn else self._caption(sample, step, row))
            samples.append(sample)
        tokens, report.n_truncated = self._tokenizer.tokenize(captions)
        optional = {**pictures, **self._labels(samples), **self._text_views(captions, samples, step)}
        ids = torch.tensor([sample.sample_id for sample in samples])
        return Batch(text=tokens, sample_id=ids, key=[sample.key for sample in samples], **optional), report

    @property
    def nbytes(self) -> int:
        """Bytes of one item's tensors, near enough to find room for them."""
        pixels = sum(math.prod(shape) for shape in self._picture_shapes().values())
        widths = self.optional
        n_texts = 1 + sum(widths.get(name, 0) for name in ("negatives", "counterfactual", "text_views"))
        n_numbers = sum(widths.get(name, 0) for name in ("teacher_image", "teacher_text", "concept_targets"))
        return len(self.rows) * (pixels + 8 * self.text.context_length * n_texts + 4 * n_numbers)

    def _new_pictures(self) -> dict[str, Tensor]:
        """Uninitialised rows of the fields that hold pictures."""
        if not self.pixels:
            return {"image": torch.empty(len(self.rows), 3, 0, 0, dtype=torch.uint8)}
        return {name: _new_pixels((len(self.rows), *shape)) for name, shape in self._picture_shapes().items()}

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

    def _sample(self, step: int, row: int, ids: np.ndarray, out: dict[str, Tensor], report: Report) -> Sample:
        """The sample of this row, or its first usable stand-in, with its pictures written to `out`."""
        wanted = int(ids[row])
        stand_ins = self.mixture.replacements(wanted, step, row, ids)
        for sample_id in itertools.chain([wanted], itertools.islice(stand_ins, _TRIES)):
            key = ""
            try:
                sample = self.mixture.read(sample_id)
                key = sample.key
                self._draw(sample, step, row, out)
                return sample
            except (OSError, ValueError) as error:
                report.bad.append((sample_id, key, f"{type(error).__name__}: {error}"))
        raise DataError(f"sample {wanted} and {_TRIES} stand-ins of its source are all bad; the last: {report.bad[-1]}")

    def _draw(self, sample: Sample, step: int, row: int, out: dict[str, Tensor]) -> None:
        """Write the sample's pictures; raises ValueError for one that cannot be decoded."""
        if not self.pixels:
            return

        def chance(purpose: str, *position: int) -> random.Random:
            return random.Random(self._seed(purpose, step, row, sample.sample_id, *position))

        augment, views = self.data.augment, self.data.views
        if views is None:
            out["image"].copy_(decode.train(sample.image, self.image, augment, chance("pixels")))
        else:
            image = decode.decode(sample.image)  # once for all views, so at full size
            out["image"].copy_(decode.random_crop(image, self.image, augment, chance("pixels")))
            for v, view in enumerate(out["image_views"]):
                view.copy_(decode.random_crop(image, self.image, views.augment, chance("view", v)))
        if "negative_image" in out:
            out["negative_image"].zero_()
            if sample.negative_image:
                out["negative_image"].copy_(decode.train(sample.negative_image, self.image, augment, chance("negative")))

    def _seed(self, purpose: str, *position: int) -> int:
        return derive(self.mixture.seed, purpose, *position)

    def _caption(self, sample: Sample, step: int, row: int) -> str:
        captions, config = sample.captions, self.data.captions
        if config.choose == "first" or len(captions) == 1:
            return captions[0]
        seed = self._seed("caption", step, row, sample.sample_id)
        if config.choose == "weights":
            offered = captions[: len(config.weights)]
            return random.Random(seed).choices(offered, config.weights[: len(offered)])[0]
        return captions[seed % len(captions)]

    def _labels(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The optional fields that come from the samples' JSON or lie beside them."""
        result: dict[str, Tensor] = {}
        if k := self.optional.get("negatives", 0):
            texts = [text_list(sample.meta, "negatives")[:k] for sample in samples]
            valid = [_valid(sample)[:k] for sample in samples]
            result["negatives"] = self._tokens([row + [""] * (k - len(row)) for row in texts])
            result["negatives_valid"] = torch.tensor([row + [False] * (k - len(row)) for row in valid])
            if "negative_image" in self.optional:
                result["negatives_valid"][:, 0] &= torch.tensor([bool(sample.negative_image) for sample in samples])
        if c := self.optional.get("counterfactual", 0):
            texts = [text_list(sample.meta, "counterfactuals") for sample in samples]
            # A sample with fewer than C repeats its own, so that a valid row has C real texts.
            result["counterfactual"] = self._tokens([[row[i % len(row)] if row else "" for i in range(c)] for row in texts])
            result["counterfactual_valid"] = torch.tensor([bool(row) for row in texts])
        if "score" in self.optional:
            for sample in samples:
                if not 0 <= sample.meta["score"] < math.inf:
                    raise DataError(f"sample {sample.key!r} has the score {sample.meta['score']}, expected a number >= 0")
            result["score"] = torch.tensor([float(sample.meta["score"]) for sample in samples], dtype=torch.float32)
        if k := self.optional.get("teacher_scores", 0):
            lists = [_numbers(sample, "negative_scores", len(text_list(sample.meta, "negatives")))[:k] for sample in samples]
            result["teacher_scores"] = torch.tensor([row + [0.0] * (k - len(row)) for row in lists], dtype=torch.float32)
        if c := self.optional.get("concept_targets", 0):
            lists = [_numbers(sample, "concepts", c) for sample in samples]
            result["concept_targets"] = torch.tensor(lists, dtype=torch.float32)
        for i, name in enumerate(("teacher_image", "teacher_text")):
            if name in self.optional:
                rows = np.stack([sample.embeddings[i] for sample in samples])
                result[name] = torch.from_numpy(rows.astype(np.float32))
        return result

    def _text_views(self, captions: list[str], samples: list[Sample], step: int) -> dict[str, Tensor]:
        views = self.data.views
        if views is None:
            return {}
        seeds = [(step, row, sample.sample_id) for row, sample in zip(self.rows, samples)]
        texts = [
            [vary(caption, views.text, random.Random(self._seed("wording", *seed, v))) for v in range(views.n)]
            for caption, seed in zip(captions, seeds)
        ]
        return {"text_views": self._tokens(texts)}

    def _tokens(self, rows: list[list[str]]) -> Tensor:
        flat = self._tokenizer([text for row in rows for text in row])
        return flat.view(len(rows), -1, flat.shape[-1])


def _valid(sample: Sample) -> list[bool]:
    """Which of a sample's negatives count: those with a text that its JSON does not mask."""
    texts, mask = text_list(sample.meta, "negatives"), sample.meta.get("negatives_valid")
    if not isinstance(mask, list) or len(mask) != len(texts):
        mask = [True] * len(texts)
    return [bool(text.strip()) and bool(valid) for text, valid in zip(texts, mask)]


def _numbers(sample: Sample, field: str, count: int) -> list[float]:
    values = sample.meta[field]
    if len(values) != count:
        raise DataError(
            f"sample {sample.key!r} has {len(values)} numbers in {field!r}, expected {count}: one for each "
            f"{'of its negatives' if field == 'negative_scores' else 'concept, as the first sample has'}"
        )
    return [float(value) for value in values]


def _new_pixels(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a loader process already in the shared memory through which it will travel: one copy less."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)
