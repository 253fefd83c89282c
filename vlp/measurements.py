"""What a logged step shows beyond its loss, and the means of all ranks."""

from __future__ import annotations

import math
import sys
from resource import RUSAGE_SELF, getrusage

import torch
from torch import Tensor

from vlp import dist, geometry
from vlp.fields import EMBEDDED
from vlp.losses import Objective
from vlp.types import Batch

MEASURED = 512  # rows of a rank that `space` measures
_GIB = 2**30
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of getrusage


def measurements(
    objective: Objective, batch: Batch, leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Further scalars of a step that is logged: "log_n", what a row's term is worth when nothing
    is known; "valid.FIELD", the share of this rank's texts that take part; and `space`.
    """
    shares = {
        f"valid.{name}": getattr(batch, row.valid).float().mean()
        for name, row in EMBEDDED.items()
        if name in leaves and row.tower == "text" and row.valid
    }
    log_n = math.log(objective.candidates(len(batch)))

    embeddings = space(leaves["image"].detach(), leaves["text"].detach())
    return {**shares, "log_n": torch.tensor(log_n), **embeddings}


def space(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """How this rank's embeddings [b, D] lie (vlp.geometry), from the first MEASURED rows.

    2·MEASURED²·D multiplications, 0.5 GFLOP at D = 512, and only where a step is logged.
    """
    image, text = (rows[:MEASURED].float() for rows in (image, text))
    values = {
        "modality_gap": geometry.modality_gap(image, text),
        "alignment": geometry.alignment(image, text),
    }

    # A uniformity is of pairs of rows.
    if len(image) > 1:
        values["uniformity_image"] = geometry.uniformity(image)
        values["uniformity_text"] = geometry.uniformity(text)
    return {f"space.{name}": value for name, value in values.items()}


def peak_memory() -> dict[str, float]:
    """GiB that this process took at most until now: of a GPU what torch allocated, of the host what
    was resident.
    """
    peaks = {"peak_resident_gib": getrusage(RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES / _GIB}
    if torch.cuda.is_available():
        peaks["peak_device_gib"] = torch.cuda.max_memory_allocated() / _GIB
    return peaks


def means_over_ranks(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Plain numbers, averaged over ranks: by the averaging convention, the values of the whole
    step. Collective.
    """
    device = scalars["loss"].device
    # One way to the device, one all-reduce, one way back. float64 adds up float32 without rounding.
    columns = torch.stack([value.detach().to(device).double() for value in scalars.values()])
    sums = dist.all_reduce(columns, dist.world()).tolist()
    return {name: total / dist.world_size() for name, total in zip(scalars, sums)}
