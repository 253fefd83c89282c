"""Hard negatives mixed from a queue (MoCHi, arXiv 2010.01028), for both modalities.

    L = ½ Σ_directions mean_i −log [ e^{z_ii} / (Σ_j e^{z_ij} + Σ_{n ∈ Q} e^{scale·x_i·n} + Σ_{h ∈ H_i} e^{scale·x_i·h}) ]

x, t: [b, D]; Q: [Q, D] the queue of the other modality, rows of zeros being empty. H_i: [mixed, D]
mixtures of pairs of the N members of Q that score highest with x_i, norm(α n + (1−α) n'), α ~ U(0,
1), and of the query with one of them, norm(β x_i + (1−β) n), β ~ U(0, ½). Neither Q nor H has a
gradient. With nothing mixed this is InfoNCE with a queue; in the paper, which has one modality, the
pair itself is the only candidate of the batch (`in_batch: false`).

Draws are a function of (seed, step, row of the step), whatever the ranks. Rows are mixed in blocks
of the queue's size and again in backward: O((b + Q)·D + b·(N + mixed)) memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlp.losses._inputs import Inputs
from vlp.losses._queue import filled
from vlp.pairwise import Pairs, logaddexp, softplus
from vlp.seeds import derive

NEEDS = frozenset({"image", "text", "scale", "queue_image", "queue_text"})


@dataclass(frozen=True)
class Options:
    hardest: int = 1024  # N, or as many as the queue holds
    mixed_pairs: int = 1024  # mixtures of two of them
    mixed_queries: int = 128  # mixtures of the query with one of them
    in_batch: bool = True  # the other pairs of the batch are candidates too

    def __post_init__(self) -> None:
        if self.hardest < 1 or min(self.mixed_pairs, self.mixed_queries) < 0:
            raise ValueError(
                f"expected hardest >= 1, mixed_pairs and mixed_queries >= 0, found {self}"
            )


def term(inputs: Inputs, pairs: Pairs, options: Options) -> Tensor:
    inputs = inputs.wide()
    scale = torch.as_tensor(inputs.scale, device=inputs.image.device)
    if options.in_batch:
        rows, columns, positive = pairs.logsumexp(inputs.image, inputs.text, scale)
    else:
        positive = scale * (inputs.image * inputs.text).sum(1)
        rows = columns = torch.full_like(positive, -torch.inf)
    rows = logaddexp(
        rows,
        _from_queue(inputs.image, inputs.queue_text, scale, inputs.step, "text", pairs, options),
    )
    columns = logaddexp(
        columns,
        _from_queue(inputs.text, inputs.queue_image, scale, inputs.step, "image", pairs, options),
    )
    return pairs.mean(softplus(rows - positive) + softplus(columns - positive)) / 2


def _from_queue(
    query: Tensor,
    queue: Tensor,
    scale: Tensor,
    step: int | None,
    name: str,
    pairs: Pairs,
    options: Options,
) -> Tensor:
    """log Σ over the queue and the mixtures, [b]."""
    queue = filled(queue, len(query), pairs)
    found = pairs.alone.row_logsumexp(query, queue, scale)
    n_mixed = options.mixed_pairs + options.mixed_queries
    if not n_mixed or not len(queue):
        return found
    hardest = pairs.alone.hardest(query, queue, min(options.hardest, len(queue)), paired=False)
    first_row = pairs.backend.ranks.index * len(query)
    seed = derive(pairs.backend.seed, "mixing", name, step or 0)
    parts = []
    for start in range(0, len(query), size := max(len(queue) // n_mixed, 1)):
        rows = slice(start, start + size)
        parts.append(
            checkpoint(
                _mixed_logsumexp,
                query[rows],
                queue,
                scale,
                hardest[rows],
                first_row + start,
                seed,
                options,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return logaddexp(found, torch.cat(parts))


def _mixed_logsumexp(
    query: Tensor,
    queue: Tensor,
    scale: Tensor,
    hardest: Tensor,
    first_row: int,
    seed: int,
    options: Options,
) -> Tensor:
    with torch.no_grad():
        rows = first_row + torch.arange(len(query), device=query.device)
        mixed = mix(
            query,
            queue,
            hardest,
            draws(rows, seed, options.mixed_pairs + options.mixed_queries),
            options,
        )
    return torch.logsumexp(scale * torch.einsum("bd,bmd->bm", query, mixed), 1)


def mix(
    query: Tensor, queue: Tensor, hardest: Tensor, drawn: Iterator[Tensor], options: Options
) -> Tensor:
    """H: [b, mixed_pairs + mixed_queries, D] unit rows. `drawn` gives uniform numbers [b, mixed],
    three times.
    """
    n, which, other, weight = hardest.shape[1], *drawn
    first = (which * n).long().clamp(max=n - 1)
    second = (first + 1 + (other * (n - 1)).long()) % n  # another one, where there is another
    first, second = (queue[hardest.gather(1, place)] for place in (first, second))
    second[:, options.mixed_pairs :] = query.unsqueeze(1)
    weight[:, options.mixed_pairs :] = (
        1 - weight[:, options.mixed_pairs :] / 2
    )  # of the negative: the query has less
    return F.normalize(torch.lerp(second, first, weight.unsqueeze(2).to(first)), dim=2)


def draws(rows: Tensor, seed: int, n: int) -> Iterator[Tensor]:
    """Three times uniform numbers in [0, 1), [b, n] float64, from a hash of (seed, row, column):
    the same for a row on any rank, in any block and on any device.
    """
    column = torch.arange(n, device=rows.device)
    for turn in range(3):
        state = _hash(rows.unsqueeze(1) ^ (seed & 0xFFFFFFFF))
        state = _hash(state ^ (3 * column + turn + (seed >> 32 & 0x7FFFFFFF)))
        yield state.double() / 2**32


def _hash(state: Tensor) -> Tensor:
    """Mix the bits of 32-bit numbers held in int64 (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    return state ^ (state >> 16)
