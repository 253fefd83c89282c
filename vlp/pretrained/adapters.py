"""Tensors with low-rank adapters as those of plain towers (vlp.models.lora makes the adapters)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# peft's names
_A, _B, _BASE = "lora_A.default.weight", "lora_B.default.weight", "base_layer."


def merged(weights: Mapping[str, Tensor], scalings: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of a model without adapters: W + scaling·B·A under the names of the plain towers.

    `scalings`: alpha/r of each adapted tower, "visual" or "text". Others stay as they are.
    """
    plain: dict[str, Tensor] = {}
    for name, value in weights.items():
        scaling = scalings.get(name.partition(".")[0])
        if scaling is None:
            plain[name] = value
            continue
        if name.endswith((_A, _B)):
            continue

        if name.endswith(f"{_BASE}weight"):
            layer = name.removesuffix(f"{_BASE}weight")
            # In float64: the sum is rounded once.
            a, b = weights[layer + _A].double(), weights[layer + _B].double()
            value = (value.double() + scaling * (b @ a)).to(value.dtype)
        name = name.replace(f".{_BASE}", ".")
        plain[re.sub(r"\.attn\.in_proj\.(weight|bias)$", r".attn.in_proj_\1", name)] = value
    return plain


def adapters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B alone, by name."""
    return {name: value for name, value in weights.items() if name.endswith((_A, _B))}
