"""Embeddings of pictures and texts in three lines: what `vlp.load` returns.

    model = vlp.load("runs/demo")
    images = model.images(["a.jpg", "b.png"])      # [2, D]
    texts = model.texts(["a red square"])          # [1, D]

    model.captions(["a.jpg"])                      # of a model with a text decoder

A thin front over `vlp.eval.models`, so that a picture is decoded, cut and normalised here exactly
as it is in evaluation. For whole data sets there is `vlp data embed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageOps
from torch import Tensor

from vlp.data import picture
from vlp.eval import models
from vlp.eval.describers import describe, no_decoder
from vlp.eval.models import Encoder
from vlp.joining import local_device
from vlp.models.describe import GREEDY, Search

BATCH = 64  # pictures or texts a forward pass
THREADS = 8  # that decode; Pillow works outside the interpreter's lock

Picture = Image.Image | str | PathLike[str]


@dataclass(frozen=True)
class Model:
    """A dual encoder that takes pictures and texts and returns rows to compare.

    Cosines of pictures and texts are `images @ texts.T`; `scale` times these are the model's
    logits.
    """

    encoder: Encoder

    def images(self, pictures: Sequence[Picture], batch: int = BATCH) -> Tensor:
        """Embed pictures: Pillow images, paths, or a mixture; [n, D] float32 unit rows on the CPU.

        Raises ValueError for a picture that does not open, by name, and for a single picture in
        place of a list.
        """
        _refuse_single(pictures, "images")
        # torch cannot join no rows; a caller's loop may well come with none.
        if not pictures:
            return torch.zeros(0, self.width)

        rows = []
        with ThreadPoolExecutor(THREADS) as pool:
            # Batch by batch: pixels of all pictures at once would not fit in memory.
            for start in range(0, len(pictures), batch):
                pixels = list(pool.map(self._pixels, pictures[start : start + batch]))
                rows.append(self.encoder.encode_images(torch.stack(pixels)).cpu())
        return torch.cat(rows)

    def texts(self, texts: Sequence[str], batch: int = BATCH) -> Tensor:
        """Embed texts, as they are and without a template; [n, D] float32 unit rows on the CPU."""
        _refuse_single(texts, "texts")
        if not texts:
            return torch.zeros(0, self.width)

        # Texts of any number: the tower sees `batch` of them at a time.
        starts = range(0, len(texts), batch)
        rows = [self.encoder.encode_texts(list(texts[i : i + batch])).cpu() for i in starts]
        return torch.cat(rows)

    def captions(
        self, pictures: Sequence[Picture], search: Search = GREEDY, batch: int = BATCH
    ) -> list[str]:
        """A caption of each picture, given as for `images`, by the model's text decoder; `search`
        is greedy, or `Search(beams=6)` and the like (vlp.models.describe).

        Raises ValueError where the model has no text decoder, as few have (coca_* of open_clip, or
        trained with model.decoder).
        """
        _refuse_single(pictures, "captions")
        describer = self.encoder.describer
        if describer is None:
            raise ValueError(no_decoder(self.encoder.name))
        describer.check(search)

        texts: list[str] = []
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(pictures), batch):
                pixels = list(pool.map(self._pixels, pictures[start : start + batch]))
                ids = describe(self.encoder, torch.stack(pixels), search)
                texts += map(describer.caption, ids.tolist())
        return texts

    @property
    def scale(self) -> float:
        """The learned inverse temperature: logits are `scale * images @ texts.T`."""
        return self.encoder.scale

    @cached_property
    def width(self) -> int:
        """D, the length of a row."""
        return self.encoder.encode_texts(["a"]).shape[1]

    def _pixels(self, source: Picture) -> Tensor:
        return self.encoder.prepare(self._rgb(source))

    def _rgb(self, source: Picture) -> Image.Image:
        decoding = self.encoder.decoding
        if isinstance(source, Image.Image):
            # Files are turned by their reader; what Pillow opened still lies as it is stored.
            upright = ImageOps.exif_transpose(source) if decoding.exif else source
            return picture.to_rgb(upright, decoding)

        # By content, as everywhere: the ending of a name may be wrong.
        try:
            return picture.rgb(Path(source).read_bytes(), decoding)
        except (OSError, picture.BadImage) as error:
            raise ValueError(
                f"image {source} does not open ({error}); expected the path of a picture, "
                "or a Pillow image"
            ) from None


def load(
    ref: str,
    *,
    device: str = "auto",
    precision: Literal["float32", "bf16"] = "float32",
) -> Model:
    """The model that `ref` names: a run, an export, a folder, `ARCHITECTURE:TAG`, `hf-hub:…`.

    device: "auto" is the GPU of the launcher's local rank, the first without one, or the CPU.
    precision: of the forward pass; rows are float32. Raises ValueError, saying what was found and
    what would work.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision is {precision!r}; expected float32 or bf16")

    autocast = torch.bfloat16 if precision == "bf16" else None
    return Model(models.load(ref, local_device(device, shared=True), autocast))


def _refuse_single(values: object, name: str) -> None:
    """A text is a sequence of letters, each of which would become a row."""
    if isinstance(values, (str, PathLike, Image.Image)):
        raise ValueError(f"{name}: found one ({values!r}), expected a list: [{values!r}]")
