"""Patches and sentences of one sample look at each other (PRIOR, arXiv 2307.12577).

    u_k = Σ_m σ(q'(t_k)·k(v_m)/√D)·v(v_m)      what sentence k sees of the picture
    c_m = Σ_k σ(q(v_m)·k'(t_k)/√D)·v'(t_k)     what patch m sees of the text, valid sentences alone
    d = mean_m 1 − ½ [cos(p(v_m), sg(c_m)) + cos(p(c_m), sg(v_m))]

v: [b, P, D] patches and t: [b, K', D] sentences in the space of the embeddings, not normalised;
q, k, v linear maps of each side, p a predictor of two layers, sg without gradient. Each gate is a
sigmoid by itself: a sentence may see no patch, or many.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlp import config
from vlp.models import tokens
from vlp.models.exact import Scaling


class Sentences(NamedTuple):
    """Which rows of the text tower are the sentences of the pairs. A tuple, because DDP, FSDP2 and
    DeepSpeed look into tuples for tensors.
    """

    first: int  # of the rows that pass the tower
    last: int
    places: Tensor | None  # [n] of these rows among all b·K' sentences; None: all are there
    valid: Tensor  # [b, K'] bool

    def of(self, features: Tensor) -> Tensor:
        """The features [b, K', D] of the sentences among those of a tower [rows, D]."""
        return in_place(features[self.first : self.last], self.places, tuple(self.valid.shape))


def in_place(rows: Tensor, places: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Rows [n, …] that take part, as [*shape, …]: zeros at the places without one."""
    of_a_row = rows.shape[1:]
    if places is not None:
        whole = rows.new_zeros(math.prod(shape), *of_a_row)
        rows = whole.index_copy(0, places, rows)
    return rows.view(*shape, *of_a_row)


class Regions(nn.Module):
    """Maps of patches and of sentences, a predictor of patches, and a scale for sentences."""

    def __init__(self, visual: nn.Module, embed_dim: int, options: config.RegionHead) -> None:
        super().__init__()
        if reason := tokens.refusal(visual):
            raise ValueError(
                f"model.heads.regions reads the patches of a picture, and the image tower {reason}"
            )

        self.image, self.text = (_maps(embed_dim) for _ in range(2))
        width = options.width or max(1, embed_dim // 2)
        self.predictor = nn.Sequential(
            nn.Linear(embed_dim, width), nn.ReLU(), nn.Linear(width, embed_dim)
        )
        self.scaling = Scaling(math.log(options.scale.init), None, options.scale)

    def forward(
        self,
        patches: Tensor,  # [b, P, D] v
        sentences: Tensor,  # [b, K', D] t
        valid: Tensor,  # [b, K'] bool
    ) -> dict[str, Tensor]:
        """attended_captions u [b, K', D] as unit rows, patch_distances d [b], region_scale []."""
        of_image = {name: layer(patches) for name, layer in self.image.items()}
        of_text = {name: layer(sentences) for name, layer in self.text.items()}

        seen_by_text = _gates(of_text["query"], of_image["key"]) @ of_image["value"]
        gates = _gates(of_image["query"], of_text["key"]) * valid.unsqueeze(1)
        seen_by_image = gates @ of_text["value"]

        return {
            "attended_captions": _unit(seen_by_text),
            "patch_distances": self._distances(patches, seen_by_image),
            "region_scale": self.scaling()[0],
        }

    def _distances(self, patches: Tensor, seen: Tensor) -> Tensor:
        similarities = _cosine(self.predictor(patches), seen.detach())
        similarities = similarities + _cosine(self.predictor(seen), patches.detach())
        return (1 - similarities / 2).mean(1)


def _maps(embed_dim: int) -> nn.ModuleDict:
    names = ("query", "key", "value")
    return nn.ModuleDict({name: nn.Linear(embed_dim, embed_dim) for name in names})


def _gates(queries: Tensor, keys: Tensor) -> Tensor:
    """σ(q·k/√D) of each query with each key of a sample, [b, queries, keys]."""
    return torch.sigmoid(queries @ keys.mT / math.sqrt(keys.shape[-1]))


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return (_unit(one) * _unit(other)).sum(-1)


def _unit(rows: Tensor) -> Tensor:
    # In half precision a norm would be off by up to .4 %.
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
