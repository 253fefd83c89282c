"""Dropout in open_clip's text transformer, which has none of its own.

Hooks of the blocks: parameters, descriptions and exports stay as they are, and what is not in
training drops nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import nn

from vlp.models.repeated import repeated


def check(text: nn.Module) -> None:
    """Refuse a text tower whose blocks cannot be told what to drop. ValueError."""
    if not isinstance(text, TextTransformer):
        raise ValueError(
            "text_tower.dropout is of open_clip's text transformer (transformer, open_clip), found "
            f"{type(text).__name__}; leave it out"
        )


def drop(text: nn.Module, share: float) -> None:
    """Let `share` of what enters each block of a text tower that `check` took be dropped."""
    for block in repeated(text):
        block.register_forward_pre_hook(partial(_dropped, share))


def _dropped(share: float, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook of a block: its first input with `share` of the numbers left out."""
    rows, *others = inputs
    return F.dropout(rows, share, block.training), *others
