"""The ends of a model that stay exact whatever its towers are cast to: pixels going in, scale and
bias coming out.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from vlp import config
from vlp.types import ImageSpec


class Pixels(nn.Module):
    """uint8 RGB → float32 (x/255 − mean) / std, as open_clip's transform computes it."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        on_cuda = image.device.type == "cuda"
        if on_cuda and torch.is_autocast_enabled("cuda") and _narrows(image.device):
            return self.narrowed(image, torch.get_autocast_dtype("cuda"))

        # In place: one float32 copy of the pixels instead of three.
        return image.float().div_(255).sub_(self.mean).div_(self.std)

    def narrowed(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """x · 1/(255 std) − mean/std in float32, rounded once to `dtype`, channels last: what the
        tower's first layer reads under autocast, in one kernel instead of five.
        """
        pixels = torch.empty_like(image, dtype=dtype, memory_format=torch.channels_last)
        slope, shift = 1 / (255 * self.std), -self.mean / self.std
        return torch.addcmul(shift, image, slope, out=pixels)

    def _apply(self, fn: Any, recurse: bool = True) -> Pixels:
        return super()._apply(_never_rounding(fn), recurse)


@functools.cache
def _narrows(device: torch.device) -> bool:
    """Whether this torch rounds in the kernel that computes; where it does not, pixels take the
    longer way.
    """
    pixels = Pixels(ImageSpec((1, 1))).to(device)
    image = torch.full((1, 3, 1, 1), 100, dtype=torch.uint8, device=device)
    try:
        pixels.narrowed(image, torch.bfloat16)
    except RuntimeError:
        return False
    return True


class Scaling(nn.Module):
    """The logit scale exp(logit_scale), at most `config.max`, and the optional logit bias, never
    below float32.

    bf16 stores ln 100 as 4.59375, which is 98.9: the parameters therefore ignore casts of the
    model. They are [1], not scalars, because FSDP2 shards no scalars.
    """

    def __init__(self, log_scale: float, bias: float | None, settings: config.Scale) -> None:
        super().__init__()
        self.log_max = math.log(settings.max)

        # A parameter even where it is not learned: it is saved and exported alike.
        start = torch.tensor([log_scale], dtype=torch.float32)
        self.logit_scale = nn.Parameter(start, requires_grad=settings.learned)

        self.logit_bias: nn.Parameter | None = None
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor([bias], dtype=torch.float32))

    def set(self, scale: float) -> None:
        """Let the scale be this number, as far as its bound allows."""
        with torch.no_grad():
            self.logit_scale.fill_(min(math.log(scale), self.log_max))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """(scale [], bias [] or None)."""
        scale = _Ceiling.apply(self.logit_scale, self.log_max).exp().squeeze(0)

        # Not a view: FSDP2 frees a parameter's memory after the forward.
        bias = None if self.logit_bias is None else self.logit_bias.clone().squeeze(0)
        return scale, bias

    def _apply(self, fn: Any, recurse: bool = True) -> Scaling:
        return super()._apply(_never_rounding(fn), recurse)


class _Ceiling(torch.autograd.Function):
    """min(x, ceiling), whose gradient at and above the ceiling passes where descent lowers x.

    A plain clamp has no gradient above its bound, so a scale that once got there would never come
    back; a plain straight-through estimator would let it run away. Descent lowers x where the
    gradient is positive.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(x >= ceiling)
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (reached,) = ctx.saved_tensors
        return torch.where(reached, gradient.clamp(min=0), gradient), None


def _never_rounding(fn: Any) -> Any:
    """`fn` of Module._apply, except that a cast to fewer bits becomes a mere move to the device
    asked for.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        if result.dtype in (torch.float32, torch.float64):
            return result
        return tensor.to(result.device)

    return moved
