"""Uniformity of each modality on the sphere (CUA and CUAXU, arXiv 2405.18570; Wang and Isola, arXiv
2005.10242).

    L = ½ log mean_{i<j} e^{−2‖x_i − x_j‖²} + ½ log mean_{i<j} e^{−2‖t_i − t_j‖²}

x, t: [b, D]. Unit rows are assumed: −2‖x_i − x_j‖² = 4x_i·x_j − 4, whose gradient differs from the
written one only along x_i, where normalisation removes it. A logarithm of a mean is no mean over
rows: every rank of a group returns the group's value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vlp.losses._inputs import Inputs
from vlp.pairwise import Pairs

NEEDS = frozenset({"image", "text"})
MIN_CANDIDATES = 2


@dataclass(frozen=True)
class Options:
    pass


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    return (
        log_mean_kernel(pairs, inputs.image, inputs.image)
        + log_mean_kernel(pairs, inputs.text, inputs.text)
    ) / 2


def log_mean_kernel(pairs: Pairs, left: Tensor, right: Tensor) -> Tensor:
    """log mean_{i≠j} e^{−2‖l_i − r_j‖²} over the group; for l = r the mean over i < j is the same."""
    n = pairs.candidates(len(left))
    rows = pairs.row_logsumexp(left, right, 4.0, paired=True)
    return pairs.log_sum(rows) - math.log(n * (n - 1)) - 4
