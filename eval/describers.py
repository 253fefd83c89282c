"""What writes captions of pictures, as evaluation sees it: a model's two towers and text decoder,
ours or open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.data.text import Frame, frame, words
from vlp.models.describe import Search, write
from vlp.pretrained import references
from vlp.types import TextSpec

if TYPE_CHECKING:
    from vlp.eval.models import Encoder


@dataclass(frozen=True)
class Describer:
    """The parts of a model that write a caption."""

    image_tokens: Callable[[Tensor], Tensor]  # pixels [n, 3, H, W] → [n, places, width]
    text: nn.Module
    decoder: Any
    tokenizer: Any
    spec: TextSpec

    @cached_property
    def frame(self) -> Frame:
        """The ids around a caption; ValueError for a tokenizer that has none."""
        return frame(self.spec)

    def check(self, search: Search) -> None:
        """Raise ValueError where this model cannot write such captions."""
        if search.max_tokens > self.spec.context_length:
            raise ValueError(
                f"max_tokens is {search.max_tokens}, and the text tower reads "
                f"{self.spec.context_length} tokens; expected at most that"
            )
        _ = self.frame  # refuses a tokenizer

    def ids(self, pixels: Tensor, search: Search) -> Tensor:
        """Token ids [n, max_tokens] of a caption for each picture, padded."""
        ids = write(self.image_tokens(pixels), self.text, self.decoder, self.frame, search)
        missing = search.max_tokens - ids.shape[1]
        return F.pad(ids, (0, missing), value=self.frame.padding)

    def caption(self, ids: list[int]) -> str:
        """The text of one caption's ids."""
        return self.tokenizer.decode(words(ids, self.frame))

    def is_cut(self, ids: list[int]) -> bool:
        """Whether a caption fills all its places, so that its end was forced."""
        return len(words(ids, self.frame)) == len(ids) - 2


@torch.no_grad()
def describe(encoder: Encoder, images: Tensor, search: Search) -> Tensor:
    """Pixels [n, 3, H, W] to token ids [n, max_tokens] of captions, by an encoder with a
    `describer`.
    """
    assert encoder.describer is not None
    with encoder.precision():
        return encoder.describer.ids(images.to(encoder.device, non_blocking=True), search)


def of_model(model: Any, tokenizer: Any) -> Describer | None:
    """Of a DualEncoder; None where it has no text decoder, as several models as one have none."""
    decoder = getattr(model, "text_decoder", None)
    if decoder is None:
        return None
    return Describer(model.image_tokens, model.text, decoder, tokenizer, model.text_spec)


def of_open_clip(model: Any, tokenizer: Any, spec: TextSpec) -> Describer | None:
    """Of a model of open_clip's; None where it is no CoCa."""
    decoder = getattr(model, "text_decoder", None)
    if decoder is None:
        return None
    return Describer(lambda pixels: model.visual(pixels)[1], model.text, decoder, tokenizer, spec)


def check_reference(text: str) -> None:
    """Raise ValueError for a model that is known to have no text decoder before its weights are
    read: those of runs and files of weights are not.
    """
    reference = references.resolve(text)
    described: dict[str, Any] = {}
    if reference.kind == "tag":
        described = references.describe(reference.architecture)["model_cfg"]
    elif reference.kind == "open_clip":
        described = references.read_config(reference.path)["model_cfg"]
    elif reference.kind != "transformers":
        return
    if "multimodal_cfg" not in described:
        raise ValueError(no_decoder(text))


def no_decoder(name: str) -> str:
    """Why a model cannot be asked for captions, and which can."""
    return (
        f"{name} has no text decoder, which captions need; take a CoCa (coca_* of open_clip), or a "
        "model trained with model.decoder"
    )
