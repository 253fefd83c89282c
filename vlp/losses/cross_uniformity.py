"""Uniformity across modalities, the X of CUAXU (arXiv 2405.18570).

L = log mean_{i≠j} e^{−2‖x_i − t_j‖²}        (x, t: [b, D] unit rows; see `uniformity`)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.losses.uniformity import log_mean_kernel
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    return log_mean_kernel(pairs, inputs.image, inputs.text)
