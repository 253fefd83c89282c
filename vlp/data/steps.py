"""One rank's rows of a step: read, decode, crop, choose captions, tokenize → `Batch`. Runs in the
loader processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from vlp.config import Data, Frames, Members
from vlp.data import decode, frames, labels, modalities, nodes, row_numbers, text
from vlp.data.mix import Mixture
from vlp.data.modalities import Further, Shapes
from vlp.data.raw_texts import CAPTION_BYTES, to_bytes
from vlp.data.row import Row, choose_caption
from vlp.data.row_texts import TEXTS, Texts
from vlp.data.sources import StoreAway
from vlp.fields import CARRIED, EMBEDDED, LABELS
from vlp.text_store import TextStore
from vlp.types import Batch, ImageSpec, TextSpec

_TRIES = 64  # stand-ins for one bad sample before the data is called unusable


class DataError(RuntimeError):
    """The data cannot be trained on: too many bad samples, a stalled shard, or a resumed run on
    other data.
    """


class DataAway(DataError):
    """The data cannot be had now; a run goes on with them later."""


@dataclass
class Report:
    """Counts and problems of one batch while it was made."""

    bad: list[tuple[int, str, str]]  # sample id, key where known, reason
    n_truncated: int  # texts that are cut to the context
    n_texts: int  # of all that are tokenized and count
    # Bytes of remote shards that were fetched meanwhile, and those of samples that were read.
    fetched_bytes: int = 0
    used_bytes: int = 0


class Steps(Dataset):
    """Item s·P + p: part p of the P parts of this rank's rows of step s, with a report. Sent to
    every loader process.
    """

    def __init__(
        self,
        mixture: Mixture,
        data: Data,
        image: ImageSpec,
        text: TextSpec,
        batch: int,
        rank: int,
        world: int,
        widths: dict[str, int],
        pixels: bool,
        store: TextStore | None = None,
        stored_crops: bool = True,
        modalities: Shapes = MappingProxyType({}),
        decoded: Mapping[str, Members] = MappingProxyType({}),
        random_pieces: bool = True,
    ) -> None:
        self.mixture, self.data = mixture, data
        self.image, self.text = image, text
        self.widths = widths  # of the optional fields that are made
        self.pixels = pixels and data.pairs == "image"
        self.store = store  # of text embeddings, which take the place of token ids
        self.stored_crops = stored_crops  # rows have the crops that teachers embedded
        self.modalities = dict(modalities)  # further ones: (T, F) of each by name
        self.decoded = dict(decoded)  # those of them that members of the samples make
        self.random_pieces = random_pieces  # of longer sounds; False: their middle

        # This rank's rows of each step.
        self.size = batch
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)
        self.parts = 1  # P
        self._tokenizer: Any = None
        # The last step that lost a sample, and all of its samples.
        self._whole_step: tuple[int, np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Each process builds its own tokenizer: its caches are large.
        return {**self.__dict__, "_tokenizer": None, "_whole_step": None}

    def __getitem__(self, item: int) -> tuple[Batch, Report]:
        step, part = divmod(item, self.parts)
        numbers = self.rows_of(part)
        if self._tokenizer is None:
            self._tokenizer = text.build(self.text) if self.store is None else self.store

        # Only the rows of this part: the whole step of many ranks has a million.
        drawn = self.mixture.rows(step, self.size, numbers)
        # Shards of later rows are fetched meanwhile, and at the start several at once.
        ahead = nodes.steps_ahead(self.mixture, self.size)
        if ahead:
            later = self.mixture.rows(step + ahead, self.size, numbers)
            nodes.prepare(self.mixture, drawn.samples)
            nodes.prepare(self.mixture, later.samples)

        report = Report([], 0, len(numbers))
        pictures = self._new_pictures(len(numbers))
        rows = []
        for i, number in enumerate(numbers):
            out = {name: values[i] for name, values in pictures.items()}
            caption = None if drawn.captions is None else int(drawn.captions[i])
            try:
                row = self._row(step, number, int(drawn.samples[i]), caption, out, report)
            except StoreAway as error:
                raise DataAway(f"step {step}: {error}") from error
            rows.append(row)
        report.fetched_bytes, report.used_bytes = nodes.traffic(self.mixture)

        # Tokenized together: once the pictures are drawn, no sample is replaced any more.
        tokens, report.n_truncated = self._tokenizer.tokenize([row.caption for row in rows])
        if self.data.pairs == "text":
            queries = [row.query for row in rows]
            pictures["image"], n_truncated = self._tokenizer.tokenize(queries)
            report.n_truncated += n_truncated
            report.n_texts += len(rows)
        batch = Batch(
            text=tokens,
            sample_id=torch.tensor([row.sample.sample_id for row in rows]),
            key=[row.sample.key for row in rows],
            **pictures,
            **self._numbers(rows),
            **self._texts(rows, report),
        )
        return batch, report

    def rows_of(self, part: int) -> range:
        """The rows of the global batch that a part of this rank's holds; parts differ by a row."""
        n = len(self.rows)
        return self.rows[part * n // self.parts : (part + 1) * n // self.parts]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of this rank's rows of a step, near enough to find room for them."""
        pixels = sum(math.prod(shape) for shape in self._picture_shapes().values())
        n_sides = 2 if self.data.pairs == "text" else 1
        n_texts = n_sides + sum(self.widths.get(name, 0) for name in TEXTS)
        n_numbers = sum(self.widths.get(name, 0) for name in LABELS)
        n_numbers += self.widths.get("negatives_bytes", 0) * CAPTION_BYTES // 4

        text_bytes = 8 * self.text.context_length
        if self.store is not None:
            text_bytes = 4 * self.store.width
        return len(self.rows) * (pixels + text_bytes * n_texts + 4 * n_numbers)

    def _new_pictures(self, n: int) -> dict[str, Tensor]:
        """n uninitialised rows of the fields that hold pictures."""
        if not self.pixels:
            return {"image": torch.empty(n, 3, 0, 0, dtype=torch.uint8)}
        return {name: _new_pixels((n, *shape)) for name, shape in self._picture_shapes().items()}

    def _picture_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each field that holds pictures."""
        if not self.pixels:
            return {}

        one = (3, *self.image.size)
        shapes: dict[str, tuple[int, ...]] = {"image": one}
        if "negative_images" in self.widths:
            shapes["negative_images"] = (self.widths["negative_images"], *one)
        if "image_views" in self.widths:
            shapes["image_views"] = (self.widths["image_views"], *one)
        if "frames" in self.widths:
            shapes["frames"] = (self.widths["frames"], *one)
        return shapes

    def _row(
        self,
        step: int,
        number: int,
        wanted: int,
        place: int | None,
        out: dict[str, Tensor],
        report: Report,
    ) -> Row:
        """The sample `wanted` of this row, or its first usable stand-in, with its pictures written
        to `out`.

        `place`: which of the sample's captions stands in the row, where the mixture draws them; a
        stand-in's is chosen.
        """
        stand_ins = self._stand_ins(wanted, step, number)
        for sample_id in itertools.chain([wanted], itertools.islice(stand_ins, _TRIES)):
            key = ""  # not known before the sample is read
            try:
                sample = self.mixture.read(sample_id)
                key = sample.key
                row_numbers.check(sample, self.widths, self.data)

                row = Row(sample, self.mixture.seed, step, number)
                if place is not None and sample_id == wanted:
                    caption = sample.captions[place]
                else:
                    caption = choose_caption(row, self.data.captions)
                row = replace(row, caption=caption)
                self._check_label(row)
                self._check_stored(row)
                row = replace(row, further=self._further(row))

                # Last, because it is the dearest, and a picture may be what is bad.
                self._draw(row, out)
                return row
            except (OSError, ValueError) as error:
                report.bad.append((sample_id, key, f"{type(error).__name__}: {error}"))

        raise DataError(
            f"sample {wanted} and {_TRIES} stand-ins of its source are all bad; the last: "
            f"{report.bad[-1]}"
        )

    def _stand_ins(self, sample_id: int, step: int, number: int) -> Iterator[int]:
        """Samples that may take the place of one that is bad, see `Mixture.replacements`."""
        # Stand-ins must not meet in the batch, so the whole of it is needed; only here, because a
        # million rows take seconds, and most steps lose no sample.
        if self._whole_step is None or self._whole_step[0] != step:
            self._whole_step = step, self.mixture.batch(step, self.size)
        yield from self.mixture.replacements(sample_id, step, number, self._whole_step[1])

    def _check_label(self, row: Row) -> None:
        """Raise ValueError for a sample without the label that a term reads."""
        if "label" in self.widths and self.data.labels is not None:
            labels.of_row(row, self.data.labels)

    def _check_stored(self, row: Row) -> None:
        """Raise ValueError for a sample with a text that has no stored embedding,
        where such are read.
        """
        if "teacher_text" in self.widths and row.sample.embeddings is not None:
            row.sample.embeddings.text(row.caption)
        if self.store is None:
            return
        self.store.check([row.caption])
        if self.data.pairs == "text":
            self.store.check([row.query])
        for name, field in TEXTS.items():
            if name in self.widths:
                further = field.of_row(row, self.data, self.widths[name])
                self.store.check(filter(None, further.texts))

    def _draw(self, row: Row, out: dict[str, Tensor]) -> None:
        """Write the row's pictures; raises ValueError for one that cannot be decoded."""
        if not self.pixels:
            return

        stored, spec = row.sample.image, self.image
        augment, views = self.data.augment, self.data.views

        if views is None:
            out["image"].copy_(self._cropped(row))
        else:
            # Decoded once for all views, so at full size.
            picture = decode.decode(stored, spec.decoding)
            out["image"].copy_(self._cropped(row, picture))
            for v, view in enumerate(out["image_views"]):
                crop = decode.random_crop(picture, spec, views.augment, row.chance("view", v))
                view.copy_(crop)

        if "frames" in out:
            [name] = [name for name, made in self.decoded.items() if isinstance(made, Frames)]
            frames.draw(row, name, spec, augment, out["frames"])

        # Black where a negative of the row has none.
        if "negative_images" in out:
            out["negative_images"].zero_()
            stored_negatives = row.negative_images(len(out["negative_images"]))
            for k, negative in enumerate(stored_negatives):
                if negative:
                    chance = row.chance("negative", k)
                    picture = decode.train_transform(negative, spec, augment, chance)
                    out["negative_images"][k].copy_(picture)

    def _cropped(self, row: Row, picture: Tensor | None = None) -> Tensor:
        """The row's image [3, H, W]: the crop that its teachers embedded, where they embedded
        crops; else one of its own, of `picture` where that is decoded already.
        """
        sample, spec, augment = row.sample, self.image, self.data.augment
        view = self._view(row)
        if view is not None:
            assert sample.embeddings is not None and sample.embeddings.of.views is not None
            return sample.embeddings.of.views.pixels(sample.image, sample.key, view, spec)

        chance = row.chance("pixels")
        if picture is None:
            return decode.train_transform(sample.image, spec, augment, chance)
        return decode.random_crop(picture, spec, augment, chance)

    def _view(self, row: Row) -> int | None:
        """Which of the crops that teachers embedded stands in the row; None where there are
        none.
        """
        stored = row.sample.embeddings
        if stored is None or stored.of.views is None or not self.stored_crops:
            return None
        return row.draw("stored view") % stored.of.views.n

    def _numbers(self, rows: list[Row]) -> dict[str, Tensor]:
        """The labels of the samples' JSON, and the embeddings that lie beside them."""
        result = {}
        for name, width in self.widths.items():
            if CARRIED[name].json:
                values = [row_numbers.of_row(row, name, width, self.data) for row in rows]
                result[name] = torch.tensor(values, dtype=torch.float32)
            elif name in ("teacher_image", "teacher_text"):
                of_rows = [self._of_teachers(row, name) for row in rows]
                result[name] = torch.from_numpy(np.stack(of_rows))
            elif name == "label":
                assert self.data.labels is not None, "the field is offered only with it"
                kinds = [labels.of_row(row, self.data.labels) for row in rows]
                result[name] = torch.tensor(kinds, dtype=torch.int64)
            elif name in ("modalities", "modality_lengths"):
                further = [row.further for row in rows if row.further is not None]
                place = ("modalities", "modality_lengths").index(name)
                result[name] = torch.from_numpy(np.stack([of_row[place] for of_row in further]))
            elif name == "caption_bytes":
                result[name] = to_bytes([row.caption for row in rows])
        return result

    def _further(self, row: Row) -> Further | None:
        """The further modalities of a row's sample, side by side; ValueError where they cannot be
        used.
        """
        if "modalities" not in self.widths:
            return None
        chance = (lambda name: row.chance(f"piece of {name}")) if self.random_pieces else None
        return modalities.further(row.sample, self.modalities, self.decoded, chance)

    def _of_teachers(self, row: Row, name: str) -> np.ndarray:
        """The stored embeddings of a row's crop, or of its caption."""
        stored = row.sample.embeddings
        assert stored is not None, "the fields are offered only where every sample has them"
        return stored.text(row.caption) if name == "teacher_text" else stored.image(self._view(row))

    def _texts(self, rows: list[Row], report: Report) -> dict[str, Tensor]:
        """Token ids of the further texts, and the masks of those that count."""
        result = {}
        for name, field in TEXTS.items():
            if name not in self.widths:
                continue

            width = self.widths[name]
            of_rows = [field.of_row(row, self.data, width) for row in rows]
            result[name], n_truncated = self._tokens(name, of_rows)
            report.n_truncated += n_truncated
            report.n_texts += sum(sum(row.valid) for row in of_rows)
            if mask := EMBEDDED[name].valid:
                result[mask] = _mask(mask, of_rows)
            if f"{name}_bytes" in self.widths:
                texts = list(itertools.chain.from_iterable(row.texts for row in of_rows))
                result[f"{name}_bytes"] = to_bytes(texts).view(len(of_rows), width, -1)

        if "negative_images" in self.widths:
            width = self.widths["negative_images"]
            pictured = [list(map(bool, row.negative_images(width))) for row in rows]
            is_valid = result["negatives_valid"][:, :width]
            result["negative_images_valid"] = torch.tensor(pictured) & is_valid
        return result

    def _tokens(self, name: str, of_rows: list[Texts]) -> tuple[Tensor, int]:
        """[b, width, L], or [b, L] where the field holds one text a row; and how many were cut.

        Of a store L is the width of its rows.
        """
        texts = list(itertools.chain.from_iterable(row.texts for row in of_rows))
        flat, n_truncated = self._tokenizer.tokenize(texts)
        one_a_row = EMBEDDED[name].batch_shape == "b L"
        shaped = flat if one_a_row else flat.view(len(of_rows), -1, flat.shape[-1])
        return shaped, n_truncated


def joined(parts: list[tuple[Batch, Report]]) -> tuple[Batch, Report]:
    """The parts of a step, in order, as one item; page-locked where a GPU will copy it."""
    if len(parts) == 1:
        return parts[0]

    batches = [batch for batch, _ in parts]
    whole: dict[str, Any] = {}
    for name in batches[0].carries() - {"key"}:
        tensors = [getattr(batch, name) for batch in batches]
        shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
        out = torch.empty(shape, dtype=tensors[0].dtype, pin_memory=torch.cuda.is_available())
        whole[name] = torch.cat(tensors, out=out)

    keys = itertools.chain.from_iterable(batch.key for batch in batches)
    bad = itertools.chain.from_iterable(report.bad for _, report in parts)
    n_truncated = sum(report.n_truncated for _, report in parts)
    n_texts = sum(report.n_texts for _, report in parts)
    fetched_bytes = sum(report.fetched_bytes for _, report in parts)
    used_bytes = sum(report.used_bytes for _, report in parts)
    report = Report(list(bad), n_truncated, n_texts, fetched_bytes, used_bytes)
    return Batch(key=list(keys), **whole), report


def _mask(name: str, of_rows: list[Texts]) -> Tensor:
    """Which texts count, [b, width], or [b] where the mask is of whole rows."""
    if CARRIED[name].batch_shape == "b":
        return torch.tensor([any(row.valid) for row in of_rows])
    return torch.tensor([row.valid for row in of_rows])


def _new_pixels(shape: tuple[int, ...]) -> Tensor:
    """Uninitialised uint8; in a loader process already in the shared memory through which it will
    travel: one copy less.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)

    # As torch's own collate function does.
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    return flat.view(shape)
