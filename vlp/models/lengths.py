"""Texts pass the tower cut to their length: padding costs as much as words do, and a caption of
COCO fills 14 of CLIP's 77 tokens.

The rows of one call are sorted by length and dealt to at most PARTS parts: the shorter half, the
shorter half of the rest, and so on. Each part is cut to its longest row, rounded up to a multiple
of STEP, so that the shapes are few; parts of one length are joined. Of COCO captions 26 % of the
tokens are left.

Embeddings, and gradients, are those of the padded rows up to rounding, because only towers are cut
whose features do not depend on padding (`spared_padding`); positions stay as they are. Dropout
draws other numbers than it would for the padded rows, but the same ones for the same rows.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip import hf_model
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from vlp.data.prompted import PADDING
from vlp.models.language import LanguageTower

PARTS = 4  # a tower's call for each: more of them spare few tokens and cost launches
LEAST_ROWS = 8  # of a part
STEP = 8  # tokens; kernels and compiled graphs see multiples of it

# What open_clip's Hugging Face towers read: the first token, or a mean that leaves padding out.
_POOLERS = (hf_model.MeanPooler, hf_model.ClsPooler, hf_model.ClsLastHiddenStatePooler)


class Cut(NamedTuple):
    """How the rows of token ids [n, L] pass the tower. A tuple, because DDP, FSDP2 and DeepSpeed
    look into tuples for tensors.
    """

    order: Tensor  # [n'] int64: the rows from short to long; beyond n the shortest is repeated
    back: Tensor  # [n] int64: the place of each row in that order
    parts: tuple[tuple[int, int], ...]  # (rows, tokens of each), in that order

    @property
    def n_tokens(self) -> int:
        """Tokens that pass the tower."""
        return sum(n_rows * length for n_rows, length in self.parts)


def spared_padding(tower: nn.Module) -> int | None:
    """The id of the padding that a text tower need not see; None where its features depend on it.

    They do not where every token sees only earlier ones, or where padding is masked, and the
    features are read at a token before it. SigLIP's tower attends to its padding, and CoCa's class
    token stands behind it.
    """
    if isinstance(tower, LanguageTower):
        return PADDING
    if isinstance(tower, hf_model.HFTextEncoder):
        return tower.config.pad_token_id if isinstance(tower.pooler, _POOLERS) else None
    if not isinstance(tower, TextTransformer) or tower.cls_emb is not None:
        return None

    unseen = tower.attn_mask is not None or tower.use_pad_mask
    read_before_padding = {
        "first": True,
        "argmax": tower.pad_id == 0,  # the largest id of a row is no padding
        "eos": tower.eos_id != tower.pad_id,
    }
    if unseen and read_before_padding.get(tower.pool_type, False):
        return tower.pad_id
    return None


def cut(
    ids: np.ndarray,  # [n, L]
    padding: int | None,  # at the end of the rows; None: they keep their length
    device: torch.device,
    n_parts: int = PARTS,
    n_passed: int | None = None,  # n': None: n, in whatever shapes cost least
) -> Cut:
    """The cut of token ids, with its places on `device`.

    With `n_passed` the shapes are few, as compiled graphs want them: the number of parts and the
    rows of each depend on it alone.
    """
    context_length = ids.shape[1]
    lengths = np.full(len(ids), context_length) if padding is None else used(ids, padding)

    # Stable, so that the cut of equal rows is equal.
    order = np.argsort(lengths, kind="stable")
    n_more = 0 if n_passed is None else n_passed - len(ids)
    order = np.concatenate([order[:1].repeat(n_more), order])
    back = np.empty(len(ids), np.int64)
    back[order[n_more:]] = np.arange(n_more, len(order))

    parts = []
    first = 0
    for size in _sizes(len(order), n_parts):
        longest = int(lengths[order[first + size - 1]])
        parts.append((size, min(-(-longest // STEP) * STEP, context_length)))
        first += size

    kept_apart = n_passed is not None
    return Cut(
        sent(order, device), sent(back, device), tuple(parts) if kept_apart else _joined(parts)
    )


def used(ids: np.ndarray, padding: int) -> np.ndarray:
    """Tokens of each row of ids [n, L] without the padding at its end, at least 1: [n]."""
    from_the_end = np.argmax(ids[:, ::-1] != padding, axis=1)
    lengths = ids.shape[1] - from_the_end

    # A row of nothing else has no first token from the end.
    return np.where((ids != padding).any(axis=1), lengths, 1)


def pass_in_parts(tower: Any, ids: Tensor, cut: Cut) -> tuple[Tensor, Tensor | None]:
    """What a tower, or a function that asks it for more, makes of ids [n, L], in their order:
    features [n, D], and tokens [n, L, width] where it gives them: those that were cut away are
    zeros.
    """
    context_length = ids.shape[1]
    in_order = ids.index_select(0, cut.order)

    features, tokens = [], []
    for part, (_, length) in zip(in_order.split([n for n, _ in cut.parts]), cut.parts):
        output = tower(part[:, :length])
        if isinstance(output, tuple):
            output, of_part = output
            tokens.append(nn.functional.pad(of_part, (0, 0, 0, context_length - length)))
        features.append(output)

    whole = torch.cat(features).index_select(0, cut.back)
    return whole, torch.cat(tokens).index_select(0, cut.back) if tokens else None


def fit_mask(
    transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: the causal mask [L, L] that open_clip hands over, as long as the rows."""
    (x,) = args
    length, mask = x.shape[1], kwargs["attn_mask"]
    # Not asked whether it is longer: a compiled model would have a graph for each answer.
    if mask is not None:
        mask = mask[..., :length, :length]
    return args, kwargs | {"attn_mask": mask}


def sent(places: np.ndarray, device: torch.device) -> Tensor:
    """Places of rows, made on the host, on `device`, without waiting for it."""
    on_host = torch.from_numpy(places)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)


def _sizes(n_rows: int, n_parts: int) -> list[int]:
    """Rows of the parts, from short texts to long ones: half, half of the rest, …"""
    sizes: list[int] = []
    left = n_rows
    while len(sizes) < n_parts - 1 and left >= 2 * LEAST_ROWS:
        sizes.append(left // 2)
        left -= left // 2
    return [*sizes, left]


def _joined(parts: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Neighbours of one length as one part."""
    by_length = groupby(parts, key=lambda part: part[1])
    return tuple((sum(n for n, _ in same), length) for length, same in by_length)
