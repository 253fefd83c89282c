"""What evaluation sees of a dual encoder, whichever library runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vlp.config import Members
from vlp.eval.describers import Describer
from vlp.eval.legible import Vocabulary
from vlp.types import ON_WHITE, Decoding


class ModelError(ValueError):
    """A model reference that cannot be evaluated; the message says what is missing."""


def _none_truncated(texts: list[str]) -> int:
    return 0


@dataclass(frozen=True)
class Encoder:
    """A dual encoder as evaluation sees it. The two functions return rows of any length; the
    methods normalise them.
    """

    name: str  # the architecture, folder or run
    pretrained: str  # which weights, in open_clip's sense; "" where the name says it all
    prepare: Callable[[Image.Image], Tensor]  # one RGB picture -> pixels [3, H, W]; runs in threads
    image: Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] on `device` -> [n, D]
    text: Callable[[list[str]], Tensor]  # n sentences -> [n, D]; tokenizes
    scale: float = 1.0  # the learned inverse temperature, for the record
    device: str | torch.device = "cpu"
    # how many sentences are longer than the context
    n_truncated: Callable[[list[str]], int] = _none_truncated
    vocabulary: Vocabulary | None = None  # None: the tokenizer knows everything
    # content hash of weights and preprocessing; "": embeddings are not kept
    fingerprint: str = ""
    autocast: torch.dtype | None = None  # None: the model's own precision
    decoding: Decoding = ON_WHITE  # how stored pictures become the RGB that `prepare` gets
    tower: torch.nn.Module | None = None  # what holds the images' projection; None: not one module
    # `image` without what follows the tower; None: nothing does
    features: Callable[[Tensor], Tensor] | None = None
    # `image` and `text` with log κ [n] in place of rows; None: the model does not say how certain
    # its embeddings are
    certainty: tuple[Callable[[Tensor], Tensor], Callable[[list[str]], Tensor]] | None = None
    width: int | None = None  # how many numbers of a row count, the first ones; None: all
    # rows of further modalities side by side [n, S] and their lengths [n, O], and where the model
    # reads frames those of videos [n, F, 3, H, W] -> [n, O, D]
    others: Callable[..., Tensor] | None = None
    # (T, F) of each, by name (vlp.data.modalities)
    modality_shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    # pixels [n, 3, H, W] and the texts before and after each picture -> [n, D]; None: the model
    # reads a picture or a text, not both as one
    joint: Callable[[Tensor, list[tuple[str, str]]], Tensor] | None = None
    # those of them that are made of members of the samples (vlp.data.sounds)
    decoded_modalities: Mapping[str, Members] = field(default_factory=dict)
    # an encoded frame of a video as pixels [3, H, W]; of a model that reads frames
    prepare_frame: Callable[[bytes], Tensor] | None = None
    frame_shape: tuple[int, ...] = ()
    describer: Describer | None = None  # what writes captions; None: there is no text decoder

    def encode_images(self, images: Tensor | list[Image.Image]) -> Tensor:
        """Pictures, or pixels [n, 3, H, W] as `prepare` makes them, to [n, D] float32 unit rows."""
        if isinstance(images, list):
            images = torch.stack([self.prepare(picture) for picture in images])
        return self._unit(lambda: self.image(images.to(self.device, non_blocking=True)))

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Sentences to [n, D] float32 unit rows."""
        return self._unit(lambda: self.text(texts))

    def encode_joint(self, images: Tensor, texts: list[tuple[str, str]]) -> Tensor:
        """Pixels and the texts before and after each picture to [n, D] float32 unit rows."""
        assert self.joint is not None, "asked of a model that reads both as one"
        joint = self.joint
        return self._unit(lambda: joint(images.to(self.device, non_blocking=True), texts))

    def encode_others(self, rows: Tensor, lengths: Tensor, frames: Tensor | None = None) -> Tensor:
        """Rows of further modalities side by side, and frames of videos where the model reads them,
        to [n, O, D] float32 unit rows.
        """
        assert self.others is not None, "asked of a model with towers for them"
        others = self.others
        values = [rows, lengths] if frames is None else [rows, lengths, frames]
        return self._unit(lambda: others(*(value.to(self.device) for value in values)))

    def precision(self) -> torch.autocast:
        """What towers and text decoder compute in, as a context."""
        device_type = torch.device(self.device).type
        return torch.autocast(device_type, self.autocast, enabled=self.autocast is not None)

    def _unit(self, rows: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad(), self.precision():
            return torch.nn.functional.normalize(rows().float()[..., : self.width], dim=-1)
