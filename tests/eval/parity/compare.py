"""Figures of two libraries, how far apart they are, and what is kept of them on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Figures = dict[str, Any]  # name -> a number, or an array of numbers of any shape

BOUND = 1e-6  # the largest difference of two numbers that count as the same
KEPT_ENTRIES = 16  # of an array, spread evenly over it


@dataclass(frozen=True)
class Declared:
    """A figure in which two libraries differ on purpose; it counts for nothing."""

    name: str
    theirs: float
    ours: float
    reason: str


def tensor(figure: Any) -> Tensor:
    """A number or an array in float64."""
    if isinstance(figure, Tensor):
        return figure.detach().to(torch.float64)
    return torch.as_tensor(figure, dtype=torch.float64)


def difference(theirs: Any, ours: Any) -> float:
    """The largest difference of two figures' numbers; infinite for other shapes and for NaN."""
    first, second = tensor(theirs), tensor(ours)
    if first.shape != second.shape:
        return float("inf")

    apart = (first - second).abs()
    return float(apart.nan_to_num(nan=torch.inf).max()) if apart.numel() else 0.0


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, float]:
    """The difference of every figure; infinite where only one library has it."""
    names = list(dict.fromkeys([*theirs, *ours]))
    return {
        name: difference(theirs[name], ours[name])
        if name in theirs and name in ours
        else float("inf")
        for name in names
    }


def thinned(figure: Any) -> Any:
    """What is kept of a figure: a number as it is, of an array its shape, and entries spread over
    it.
    """
    values = tensor(figure)
    if values.ndim == 0:
        return _rounded(float(values))

    flat = values.flatten()
    n_kept = min(KEPT_ENTRIES, len(flat))
    places = torch.linspace(0, len(flat) - 1, n_kept).round().long()
    entries = [_rounded(value) for value in flat[places].tolist()]
    return {"shape": list(values.shape), "entries": entries}


def _rounded(value: float) -> float:
    # Ten digits: far below the bound, and a file that can be read.
    return float(f"{value:.10g}")


def difference_from_kept(kept: Any, ours: Any) -> float:
    """The difference of ours from what `thinned` kept of theirs."""
    thin = thinned(ours)
    if not isinstance(kept, dict):
        return float("inf") if isinstance(thin, dict) else difference(kept, thin)
    if not isinstance(thin, dict) or kept["shape"] != thin["shape"]:
        return float("inf")
    return difference(kept["entries"], thin["entries"])


def shown(figure: Any) -> str:
    """A figure in a table: a number, or the root mean square of an array and its shape."""
    values = tensor(figure)
    if values.ndim == 0:
        return f"{float(values):.8g}"
    size = "×".join(map(str, values.shape))
    return f"{float(values.square().mean().sqrt()):.6g} [{size}]"
