"""8-bit arithmetic in the forward passes of training, so that a tower keeps its quality when it is
quantised (Jacob et al., arXiv 1712.05877): what enters a layer, and its weights, take one of 255
values each.

    q(x) = s·round(x / s),   s = max |x| / 127,   ∂q/∂x = 1

s is of each output channel of the weights, and of each row (a sample, a window) of what enters, so
that no division of a batch changes it. Layers are linear ones, convolutions and self-attention's
projections; their classes are exchanged in place, so that parameters, descriptions and exports stay
as they are. Pools, which read weights without calling a layer, and layers of kinds of their own
(convolutions that pad by themselves) stay in floating point, and so does all that is not in
training mode: evaluations, moving averages, locked layers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp.models.attention import attended, self_attentions
from vlp.models.multimodal import ImageTower

_LARGEST = 127  # of 8 bits with a sign, the same on both sides of 0


def check(tower: nn.Module) -> None:
    """Refuse a tower whose layers are not its own, or that has none that could be quantised.
    ValueError.
    """
    if isinstance(tower, ImageTower):
        raise ValueError(
            "image_tower.int8_aware is of image towers, and this language model reads texts with "
            "the same weights; leave it out"
        )
    if not _layers(tower):
        raise ValueError(
            "image_tower.int8_aware is of towers of linear layers or convolutions, found "
            f"{type(tower).__name__} without any; leave it out"
        )


def quantise(tower: nn.Module) -> None:
    """Let the layers of a tower that `check` took compute with values of 8 bits."""
    for layer, kind in _layers(tower).items():
        layer.__class__ = kind


def rounded(
    values: Tensor,
    dims: tuple[int, ...],  # over which one range is taken
) -> Tensor:
    """q(values), in float32 at least."""
    wide = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
    largest = wide.detach().abs().amax(dims, keepdim=True)
    step = torch.where(largest > 0, largest / _LARGEST, 1)

    steps = (wide.detach() / step).round() * step
    return wide + (steps - wide.detach())


def _rows(values: Tensor) -> Tensor:
    """What enters a layer, a range each row."""
    return rounded(values, tuple(range(1, values.ndim)))


def _channels(weight: Tensor) -> Tensor:
    """Weights [out, …], a range each output channel."""
    return rounded(weight, tuple(range(1, weight.ndim)))


class Int8Linear(nn.Linear):
    """A linear layer of 8 bits."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        return F.linear(_rows(values), _channels(self.weight), self.bias)


class Int8Conv2d(nn.Conv2d):
    """A convolution of 8 bits."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        return self._conv_forward(_rows(values), _channels(self.weight), self.bias)


class Int8Attention(nn.MultiheadAttention):
    """Self-attention whose projections are of 8 bits; called as torch's module is."""

    def forward(  # type: ignore[override]
        self,
        query: Tensor,  # [b, L, width]; key and value are the same
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.training:
            return super().forward(
                query, key, value, need_weights=need_weights, attn_mask=attn_mask, **others
            )
        weight = _channels(self.in_proj_weight)
        joint = F.linear(_rows(query), weight, self.in_proj_bias)
        return self.out_proj(attended(joint, self.num_heads, attn_mask, self.dropout)), None


def _layers(tower: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The layers that are quantised, and the class that each gets."""
    layers: dict[nn.Module, type[nn.Module]] = {}
    for block in self_attentions(tower):
        # Its output projection is one of torch's own kind, and read where it should be called.
        layers |= {block.attn: Int8Attention, block.attn.out_proj: Int8Linear}

    # Not their subclasses, which compute what their own class says.
    kinds = {nn.Linear: Int8Linear, nn.Conv2d: Int8Conv2d}
    for module in tower.modules():
        kind = kinds.get(type(module))
        if kind is not None:
            layers[module] = kind
    return layers
