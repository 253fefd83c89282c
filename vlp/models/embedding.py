"""What the towers make of a batch, in one call of the model: the fields of `vlp.fields` that have
a tower become unit rows.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from vlp.fields import EMBEDDED, FIELDS, Field
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
    []. Rows that their mask leaves out do not pass the tower; their embeddings are zeros.
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
        _joined(texts),
        **{name: value.flatten(0, 1) for name, value in views.items()},
        **pairs,
    )

    # Apart again, each in the shape of its field.
    embedded = {}
    for name, value in views.items():
        embedded[name] = getattr(features, name).unflatten(0, value.shape[:2])
    apart = _apart(features.image, pictures) | _apart(features.text, texts)
    for name, embeddings in apart.items():
        embedded[name] = _in_place(embeddings, batch, rows[name], name)
    return embedded | _beside(features)


def _pictures(batch: Batch, rows: dict[str, Field]) -> dict[str, Tensor]:
    """Pixels [n, 3, H, W] of each wanted field, views aside: those that its mask leaves in."""
    pictures = {}
    for name, row in rows.items():
        if row.tower != "image" or row.head:
            continue
        pixels = getattr(batch, name)
        if row.valid:
            pixels = pixels[getattr(batch, row.valid)]
        pictures[name] = pixels
    return pictures


def _texts_taking_part(batch: Batch, rows: dict[str, Field]) -> dict[str, Tensor]:
    """Token ids [n, L] of each wanted field, views aside: the texts that its mask leaves in."""
    texts = {}
    for name, row in rows.items():
        if row.tower != "text" or row.head:
            continue

        # Padding would cost a forward pass of the tower, and move its statistics.
        ids = getattr(batch, name)
        if row.valid:
            ids = ids[getattr(batch, row.valid)]
        texts[name] = ids.flatten(0, -2)
    return texts


def _views(batch: Batch, rows: dict[str, Field]) -> dict[str, Tensor]:
    """Pixels and token ids [b, V, …] that pass a tower and then a head of their own."""
    return {name: getattr(batch, name) for name, row in rows.items() if row.head}


def _joined(parts: dict[str, Tensor]) -> Tensor | None:
    return torch.cat(list(parts.values())) if parts else None


def _apart(joined: Tensor | None, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of each part, the inverse of `_joined`."""
    if joined is None:
        return {}
    sizes = [len(part) for part in parts.values()]
    return dict(zip(parts, joined.split(sizes)))


def _in_place(embeddings: Tensor, batch: Batch, row: Field, name: str) -> Tensor:
    """The embeddings [n, D] of the rows that take part as [b, …, D], zeros for the others."""
    # A picture is three dimensions of the batch's, a text is one.
    n_inner = 3 if row.tower == "image" else 1
    shape = getattr(batch, name).shape[:-n_inner]
    if not row.valid:
        return embeddings.view(*shape, -1)

    mask = getattr(batch, row.valid)
    whole = embeddings.new_zeros(*shape, embeddings.shape[-1])
    whole[mask] = embeddings.view_as(whole[mask])
    return whole


def _beside(features: Features) -> dict[str, Tensor]:
    """What a model gives besides embeddings, as far as it has it."""
    values = {name: getattr(features, name) for name in (*OF_PAIRS, *NUMBERS)}
    return {name: value for name, value in values.items() if value is not None}
