"""Images cut to the principal components of their group (Long-CLIP, arXiv 2403.15378).

The release takes the components of each rank by itself; these are of all images that are candidates
of one another, so that the number of ranks changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlp.pairwise import Pairs
from vlp.pairwise.reduction import widened


def cut(
    image: Tensor,  # [b, D] unit rows
    valid: Tensor,  # [b] bool: the rows whose components count
    pairs: Pairs,
    components: int,
    renormalise: bool,
) -> Tensor:
    """(x − μ)VVᵀ + μ [b, D], μ and V [D, components] without gradient.

    ValueError where a group has no more rows than components, so that some of them would be
    arbitrary.
    """
    wide = widened(image)
    if components < image.shape[1]:
        n_candidates = pairs.candidates(len(image))
        if n_candidates <= components:
            raise ValueError(
                f"short.components: found {components} of {n_candidates} candidates, expected "
                "fewer components than candidates; lower it, or raise the batch"
            )
        mean, basis = _basis(wide.detach(), valid, pairs, components)
        wide = (wide - mean) @ basis @ basis.T + mean
    # All components give the rows themselves, without the rounding of a rotation and back.

    if renormalise:
        wide = F.normalize(wide, dim=1)
    # On CUDA pairs are multiplied in the embeddings' dtype; a CPU can afford not to round again.
    return wide.to(image.dtype) if image.is_cuda else wide


def _basis(rows: Tensor, valid: Tensor, pairs: Pairs, components: int) -> tuple[Tensor, Tensor]:
    """The mean [D] and first principal components [D, components] of the group's valid rows."""
    # D + D² numbers travel instead of n·D, in float64: the square loses half of the digits.
    kept = torch.where(valid.unsqueeze(1), rows, 0).double()
    count = pairs.sum(valid.double()).clamp(min=1)
    mean = pairs.sum_over_group(kept.sum(0)) / count
    centred = torch.where(valid.unsqueeze(1), kept - mean, 0)
    scatter = pairs.sum_over_group(centred.T @ centred)

    # NaN in a row shows in the loss; the decomposition of NaN would raise.
    finite = torch.nan_to_num(scatter, nan=0.0, posinf=0.0, neginf=0.0)
    _, vectors = torch.linalg.eigh(finite)
    basis = vectors[:, -components:]
    return mean.to(rows.dtype), basis.to(rows.dtype)
