"""Arithmetic that a step cannot do without, and what a device could do at most: their ratio is the
model FLOPs utilisation (MFU; Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

Counted is one forward and backward of the towers a row. Heads, a text decoder, the loss, and
whatever is computed a second time (micro-batches, activation checkpointing) are left out, so that
they lower the ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vlp.engines.copies import skeleton
from vlp.models.dual_encoder import DualEncoder

# FLOP/s of dense products by a part of the device's name, the first that fits, as the makers' data
# sheets state them (half of what they state with sparsity); those of bf16 as in torchtitan's
# `get_peak_flops`. float32: without TF32, which a run does not use.
_PEAKS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "H100 NVL": {torch.bfloat16: 835e12},
    "H100 PCIe": {torch.bfloat16: 756e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 67e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 19.5e12},
    "L40S": {torch.bfloat16: 362e12},
    "L4": {torch.bfloat16: 121e12},
}


@dataclass(frozen=True)
class TowerFlops:
    """FLOPs of a forward and backward pass of each tower."""

    picture: float
    token: float  # of a text at the full context length

    def of(self, pictures: float, text_tokens: float) -> float:
        """FLOPs of a step that embeds so many pictures and tokens."""
        return self.picture * pictures + self.token * text_tokens


@dataclass(frozen=True)
class Utilisation:
    """Turns what a step embeds, and its time, into a share of the device's peak."""

    flops: TowerFlops
    peak: float  # FLOP/s of one device

    def mfu(self, pictures_s: float, text_tokens_s: float) -> float:
        """MFU of a rank that embeds so many pictures and tokens a second."""
        return self.flops.of(pictures_s, text_tokens_s) / self.peak


def utilisation(model: DualEncoder, device: torch.device, dtype: torch.dtype) -> Utilisation | None:
    """How busy `device` is with `model` in `dtype`; None where its peak is not known, as of CPUs.

    Before an engine takes over the model.
    """
    peak = peak_flops(device, dtype)
    return None if peak is None else Utilisation(of_towers(model), peak)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of the device's products in `dtype` by its data sheet; None where that is not known
    here.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    of_device = next((peaks for part, peaks in _PEAKS.items() if part in name), {})
    return of_device.get(dtype)


def of_towers(model: DualEncoder) -> TowerFlops:
    """The towers' FLOPs, counted on one row; locked parts have no backward. The model and the
    random state stay as they are.
    """
    # Shapes without values: nothing is computed, whatever the model's size.
    shapes = skeleton(model).to("meta")
    pixels = torch.zeros(1, 3, *model.image_spec.size)
    try:
        picture = _counted(shapes, shapes.encode_image, pixels.to("meta"))
    except RuntimeError:
        # Multimodal language models look at values as well: where a picture stands in its prompt.
        picture = _counted_in_evaluation(model, model.encode_image, pixels)

    length = model.text_spec.context_length
    # Training reads stored rows, and the language model may not even be here.
    if getattr(model.text, "is_stored", False):
        return TowerFlops(picture, 0.0)
    ids = torch.ones(1, length, dtype=torch.int64)
    try:
        text = _counted(shapes, shapes.encode_text, ids.to("meta"))
    except RuntimeError:
        # Towers of transformers look at the values of their masks, so one text is embedded.
        text = _counted_in_evaluation(model, model.encode_text, ids)
    return TowerFlops(picture, text / length)


def _counted_in_evaluation(
    model: DualEncoder, encode: Callable[[Tensor], Tensor], rows: Tensor
) -> float:
    """FLOPs of rows that are really embedded, without dropout, which would draw numbers."""
    was_training = model.training
    model.eval()
    try:
        return _counted(model, encode, rows)
    finally:
        model.train(was_training)


def _counted(model: DualEncoder, encode: Callable[[Tensor], Tensor], rows: Tensor) -> float:
    """FLOPs of embedding some rows and of the way back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with FlopCounterMode(display=False) as counter:
        embeddings = encode(rows)
        if embeddings.requires_grad:
            # Not autograd.grad: the counter's hooks fail there on modules that read a parameter, as
            # CoCa's attentional pools do.
            embeddings.sum().backward()
    for parameter in trained:
        parameter.grad = None
    return float(counter.get_total_flops())
