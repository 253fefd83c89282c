"""What the towers make of a batch, in one call of the model: the fields of `vlp.fields` that have
a tower become unit rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlp.fields import EMBEDDED, FIELDS, Field
from vlp.models import lengths
from vlp.models.dual_encoder import DualEncoder
from vlp.models.lengths import Cut
from vlp.models.stages import Stages
from vlp.types import Batch, Features

# What heads compute of the pairs themselves, beside the embeddings: in the table's order, because
# that of the outputs is the order in which autograd adds up gradients.
OF_PAIRS = [name for name, row in FIELDS.items() if row.head and row.tower and not row.batch_shape]
NUMBERS = ("scale", "bias", "view_scale")


def embed(model: nn.Module, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """Embed the wanted fields of a batch by one call of `model`: a DualEncoder or what an engine
    wrapped around one.

    Returns the wanted fields with a tower by name, [b, …, D], the outputs of the heads for pairs
    where any is wanted, [b, …], and "scale", "bias" and "view_scale" as far as the model has them,
    []. Texts that their mask leaves out do not pass the tower; their embeddings are zeros.
    """
    rows = {name: row for name, row in EMBEDDED.items() if name in wanted}
    pictures = _pictures(batch, rows)
    texts = _texts_taking_part(batch, rows)
    views = _views(batch, rows)

    # Heads cost: they run only where one of their outputs is wanted.
    pairs = {"pairs": len(batch)} if set(OF_PAIRS).intersection(wanted) else {}

    # One call: an engine exchanges gradients once a call, and a tower is fastest with all its rows.
    features = model(
        _joined(pictures),
        _joined({name: part.ids for name, part in texts.items()}),
        **{name: value.flatten(0, 1) for name, value in views.items()},
        **pairs,
        **_cut(model, batch, texts, views),
    )

    # Apart again, each in the shape of its field.
    embedded = {}
    for name, value in views.items():
        embedded[name] = getattr(features, name).unflatten(0, value.shape[:2])
    embedded |= _apart(features.image, {name: len(part) for name, part in pictures.items()})
    sizes = {name: len(part.ids) for name, part in texts.items()}
    for name, embeddings in _apart(features.text, sizes).items():
        embedded[name] = texts[name].in_place(embeddings)
    return embedded | _beside(features)


@dataclass(frozen=True)
class _Texts:
    """The texts of a field that take part, and their places in the field."""

    ids: Tensor  # [n, L]
    on_host: np.ndarray  # [n, L], the same
    places: Tensor | None  # [n], of rows of the flattened field; None: all take part
    shape: tuple[int, ...]  # of the field, without its tokens

    @classmethod
    def of(cls, batch: Batch, name: str, valid: str) -> _Texts:
        """Of field `name` with the mask `valid`, if it has one."""
        ids = getattr(batch, name)
        shape = ids.shape[:-1]
        rows, on_host = ids.flatten(0, -2), batch.host(name).flatten(0, -2).numpy()
        if not valid:
            return cls(rows, on_host, None, shape)

        # Picked on the host: a device that is asked how many rows a mask leaves makes it wait.
        mask = batch.host(valid).numpy()
        mask = mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
        numbers = np.flatnonzero(np.broadcast_to(mask, shape))
        places = lengths.sent(numbers, ids.device)
        return cls(rows.index_select(0, places), on_host[numbers], places, shape)

    def in_place(self, embeddings: Tensor) -> Tensor:
        """The embeddings [n, D] as [b, …, D], zeros for the texts that do not take part."""
        if self.places is not None:
            whole = embeddings.new_zeros(math.prod(self.shape), embeddings.shape[-1])
            embeddings = whole.index_copy(0, self.places, embeddings)
        return embeddings.view(*self.shape, -1)


def _pictures(batch: Batch, rows: dict[str, Field]) -> dict[str, Tensor]:
    """Pixels [b, 3, H, W] of each wanted field, views aside."""
    names = [name for name, row in rows.items() if row.tower == "image" and not row.head]
    return {name: getattr(batch, name) for name in names}


def _texts_taking_part(batch: Batch, rows: dict[str, Field]) -> dict[str, _Texts]:
    """The texts of each wanted field, views aside."""
    # Those that a mask leaves out would cost a forward pass of the tower.
    return {
        name: _Texts.of(batch, name, row.valid)
        for name, row in rows.items()
        if row.tower == "text" and not row.head
    }


def _views(batch: Batch, rows: dict[str, Field]) -> dict[str, Tensor]:
    """Pixels and token ids [b, V, …] that pass a tower and then a head of their own."""
    return {name: getattr(batch, name) for name, row in rows.items() if row.head}


def _cut(
    model: nn.Module, batch: Batch, texts: dict[str, _Texts], views: Collection[str]
) -> dict[str, Cut]:
    """How the texts and their views are to pass the tower, as a keyword; none: as they are."""
    encoders = (part for part in model.modules() if isinstance(part, DualEncoder | Stages))
    encoder = next(encoders, None)
    if encoder is None or not texts:
        return {}

    ids = [part.on_host for part in texts.values()]
    n_possible = sum(math.prod(part.shape) for part in texts.values())
    if "text_views" in views:
        ids.append(batch.host("text_views").flatten(0, -2).numpy())
        n_possible += len(ids[-1])

    cut = encoder.cut(np.concatenate(ids), batch.text.device, n_possible)
    return {} if cut is None else {"cut": cut}


def _joined(parts: dict[str, Tensor]) -> Tensor | None:
    if len(parts) == 1:
        return next(iter(parts.values()))  # pixels are large: one part is not copied
    return torch.cat(list(parts.values())) if parts else None


def _apart(joined: Tensor | None, sizes: dict[str, int]) -> dict[str, Tensor]:
    """The rows of each part, the inverse of `_joined`."""
    if joined is None:
        return {}
    return dict(zip(sizes, joined.split(list(sizes.values()))))


def _beside(features: Features) -> dict[str, Tensor]:
    """What a model gives besides embeddings, as far as it has it."""
    values = {name: getattr(features, name) for name in (*OF_PAIRS, *NUMBERS)}
    return {name: value for name, value in values.items() if value is not None}
