"""What the towers make of a batch, in one call of the model: the fields of `vlp.fields` that have
a tower become unit rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vlp.fields import EMBEDDED, FIELDS, TOKEN_MASKS, TOKENS, Field
from vlp.models import lengths
from vlp.models.concatenated import Concatenated
from vlp.models.dual_encoder import DualEncoder
from vlp.models.lengths import Cut
from vlp.models.regions import Sentences, in_place
from vlp.types import Batch, Features

# What heads compute of the pairs themselves, beside the embeddings: in the table's order, because
# that of the outputs is the order in which autograd adds up gradients.
OF_PAIRS = [name for name, row in FIELDS.items() if row.head and row.tower and not row.batch_shape]
# Fields of a batch that pass a tower and then a head of their own.
VIEWS = [name for name, row in EMBEDDED.items() if row.head]
# `image` of a batch whose pairs are of texts.
_QUERIES = replace(EMBEDDED["image"], tower="text", batch_shape="b L", dtype="int64")
NUMBERS = ("scale", "bias", "view_scale", "interactive_scale", "region_scale")


def embed(
    model: nn.Module,
    batch: Batch,
    wanted: Collection[str],
    on_text: Callable[[Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Embed the wanted fields of a batch by one call of `model`: a DualEncoder or what an engine
    wrapped around one.

    Returns the wanted fields with a tower by name, [b, …, D], their tokens where those are wanted,
    [b, …, P, D], the outputs of the heads for pairs where any is wanted, [b, …], and the NUMBERS as
    far as the model has them, []. Rows that their mask leaves out do not pass the tower; their
    embeddings are zeros.

    on_text: called with "text" [b, D], without gradient, as soon as it is there
    (`DualEncoder.forward`); "text" must be wanted.
    """
    fields = _fields(batch, wanted)
    pictures, texts = (_taking_part(batch, fields, tower) for tower in ("image", "text"))
    views = _views(batch, fields)

    # Heads cost: they run only where one of their outputs is wanted.
    pairs = {"pairs": len(batch)} if set(OF_PAIRS).intersection(wanted) else {}

    token_rows = _token_rows((pictures, texts), wanted)
    tokens = {"token_rows": token_rows} if token_rows else {}

    announced = {}
    if on_text is not None:
        announced = {"on_text": lambda rows: on_text(_apart(rows, texts)["text"])}

    # One call: an engine exchanges gradients once a call, and a tower is fastest with all its rows.
    features = model(
        _joined(pictures),
        _joined(texts),
        **{name: value.flatten(0, 1) for name, value in views.items()},
        **pairs,
        **tokens,
        **_sentences(texts, batch, wanted),
        **_further(model, batch, wanted),
        **_cut(model, batch, texts, views, batch.text.device),
        **announced,
    )

    # Apart again, each in the shape of its field.
    embedded = {}
    for name, value in views.items():
        embedded[name] = getattr(features, name).unflatten(0, value.shape[:2])
    embedded |= _apart(features.image, pictures) | _apart(features.text, texts)
    for name in token_rows:
        part = (pictures | texts)[TOKENS[name].tokens_of]
        embedded[name] = part.in_place(getattr(features, name))
    return embedded | _beside(features)


def passes_towers(model: nn.Module, batch: Batch, wanted: Collection[str]) -> tuple[int, int]:
    """How many pictures, and tokens of texts, pass the towers when `embed` embeds the same:
    captions as they are cut, with the padding that is left; none of texts that come as stored
    embeddings. The device is not asked.
    """
    fields = _fields(batch, wanted)
    places = [_places(batch, name, row) for name, row in fields.items() if row.tower == "image"]
    n_pictures = sum(math.prod(shape) if rows is None else len(rows) for shape, rows in places)
    if "others" in wanted and batch.frames is not None:
        n_pictures += len(_frame_numbers(model, batch))

    texts, views = _taking_part(batch, fields, "text"), _views(batch, fields)
    cut = _cut(model, batch, texts, views, torch.device("cpu")).get("cut")
    if cut is not None:
        return n_pictures, cut.n_tokens
    ids = [part.rows for part in texts.values() if not part.rows.is_floating_point()]
    n_tokens = sum(rows.numel() for rows in ids)
    if "text_views" in views:
        n_tokens += views["text_views"].numel()
    return n_pictures, n_tokens


def _fields(batch: Batch, wanted: Collection[str]) -> dict[str, Field]:
    """The rows of the wanted fields with a tower, as this batch carries them."""
    fields = {name: field for name, field in EMBEDDED.items() if name in wanted}
    if batch.is_of_texts and "image" in fields:
        # Behind the other texts: heads read the first rows of a tower, which are those of `text`.
        del fields["image"]
        fields["image"] = _QUERIES
    return fields


def token_masks(model: nn.Module, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """Which tokens of the wanted fields of masks are the texts', [b, …, L'] bool, without asking
    the device. `model` as for `embed`.
    """
    encoder = _encoder(model)
    masks = {}
    for name in wanted:
        field = TOKEN_MASKS.get(name)
        if field is None or not isinstance(encoder, DualEncoder):
            continue

        ids = getattr(batch, field)
        mask = encoder.token_mask(ids.flatten(0, -2)).unflatten(0, ids.shape[:-1])
        # A text that takes no part has no tokens either.
        if takes_part := FIELDS[field].valid:
            mask = mask & getattr(batch, takes_part).unsqueeze(-1)
        masks[name] = mask
    return masks


def further_views(model: nn.Module, batch: Batch) -> list[str]:
    """The fields of further views that the batch carries and a head of the model projects."""
    encoder = _encoder(model)
    supplied = encoder.heads.supplies() if isinstance(encoder, DualEncoder) else frozenset()
    return [name for name in VIEWS if name in supplied and getattr(batch, name) is not None]


def _further(model: nn.Module, batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """Further modalities, their lengths, and the frames that videos have, as keywords of the
    model.
    """
    if "others" not in wanted or batch.modalities is None or batch.modality_lengths is None:
        return {}
    keywords = {"modalities": batch.modalities, "modality_lengths": batch.modality_lengths}
    if batch.frames is None:
        return keywords

    # As with negatives: what is not there would cost a forward pass, and move a batch norm.
    numbers = _frame_numbers(model, batch)
    places = lengths.sent(numbers, batch.frames.device)
    frames = batch.frames.flatten(0, 1).index_select(0, places)
    return keywords | {"frames": frames, "frame_places": places}


def _frame_numbers(model: nn.Module, batch: Batch) -> np.ndarray:
    """The places of the frames that are there among all of the batch."""
    encoder = _encoder(model)
    assert isinstance(encoder, DualEncoder) and encoder.heads.modalities is not None
    return encoder.heads.modalities.frame_places(batch.host("modality_lengths").numpy())


@dataclass(frozen=True)
class _Part:
    """The rows of a field that take part, and their places in the field."""

    rows: Tensor  # [n, 3, H, W] or [n, L]
    shape: tuple[int, ...]  # of the field, without the dimensions of a picture or a text
    # [n] of rows of the flattened field, on the host and on the device; None: all take part
    numbers: np.ndarray | None = None
    places: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch, name: str, field: Field) -> _Part:
        """Of a field that the batch carries, with its mask, if it has one."""
        shape, numbers = _places(batch, name, field)
        rows = getattr(batch, name).flatten(0, len(shape) - 1)
        if numbers is None:
            return cls(rows, shape)
        places = lengths.sent(numbers, rows.device)
        return cls(rows.index_select(0, places), shape, numbers, places)

    def in_place(self, embeddings: Tensor) -> Tensor:
        """The embeddings [n, …, D] as [b, …, D], zeros for the rows that do not take part."""
        return in_place(embeddings, self.places, self.shape)

    def on_host(self, batch: Batch, name: str) -> np.ndarray:
        """The rows of a text, [n, L], without asking the device."""
        rows = batch.host(name).flatten(0, -2).numpy()
        return rows if self.numbers is None else rows[self.numbers]


def _places(batch: Batch, name: str, field: Field) -> tuple[tuple[int, ...], np.ndarray | None]:
    """The shape of a field without the dimensions of a picture or a text, and the numbers of the
    flattened rows that take part; None: all of them.
    """
    # The table's letters less those of a picture or a text.
    n_inner = 3 if field.tower == "image" else 1
    shape = tuple(getattr(batch, name).shape[: len(field.batch_shape.split()) - n_inner])
    if not field.valid:
        return shape, None

    # Picked on the host: a device that is asked how many rows a mask leaves makes it wait.
    mask = batch.host(field.valid).numpy()
    mask = mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))
    return shape, np.flatnonzero(np.broadcast_to(mask, shape))


def _taking_part(batch: Batch, fields: dict[str, Field], tower: str) -> dict[str, _Part]:
    """What passes a tower of each wanted field, views aside."""
    # Rows that a mask leaves out would cost a forward pass, and move a batch norm's statistics.
    return {
        name: _Part.of(batch, name, field)
        for name, field in fields.items()
        if field.tower == tower and not field.head
    }


def _token_rows(
    joined: tuple[dict[str, _Part], ...], wanted: Collection[str]
) -> dict[str, tuple[int, int]]:
    """From where to where the rows stand, among those that pass their tower, of which tokens are
    wanted: by the name of the field of tokens.
    """
    rows = {}
    for parts in joined:
        spans = _spans(parts)
        for name, field in TOKENS.items():
            if name in wanted and field.tokens_of in spans:
                rows[name] = spans[field.tokens_of]
    return rows


def _sentences(
    texts: dict[str, _Part], batch: Batch, wanted: Collection[str]
) -> dict[str, Sentences]:
    """Where the head for regions finds the sentences of the pairs, as a keyword; none where none of
    its outputs is wanted.
    """
    outputs = [name for name, row in FIELDS.items() if row.head == "regions"]
    if "captions" not in texts or not set(outputs).intersection(wanted):
        return {}
    first, last = _spans(texts)["captions"]
    return {"sentences": Sentences(first, last, texts["captions"].places, batch.captions_valid)}


def _spans(parts: dict[str, _Part]) -> dict[str, tuple[int, int]]:
    """From where to where the rows of each part stand among all that pass their tower."""
    spans = {}
    first = 0
    for name, part in parts.items():
        spans[name] = (first, first + len(part.rows))
        first += len(part.rows)
    return spans


def _views(batch: Batch, fields: dict[str, Field]) -> dict[str, Tensor]:
    """Pixels and token ids [b, V, …] that pass a tower and then a head of their own."""
    return {name: getattr(batch, name) for name, field in fields.items() if field.head}


def _cut(
    model: nn.Module,
    batch: Batch,
    texts: dict[str, _Part],
    views: Collection[str],
    device: torch.device,
) -> dict[str, Cut]:
    """How the texts and their views are to pass the tower, as a keyword with its places on
    `device`; none: as they are.
    """
    encoder = _encoder(model)
    if encoder is None or not texts:
        return {}

    ids = [part.on_host(batch, name) for name, part in texts.items()]
    n_possible = sum(math.prod(part.shape) for part in texts.values())
    if "text_views" in views:
        ids.append(batch.host("text_views").flatten(0, -2).numpy())
        n_possible += len(ids[-1])

    cut = encoder.cut(np.concatenate(ids), device, n_possible)
    return {} if cut is None else {"cut": cut}


def _encoder(model: nn.Module) -> DualEncoder | Concatenated | None:
    """What an engine may have wrapped."""
    encoders = (part for part in model.modules() if isinstance(part, DualEncoder | Concatenated))
    return next(encoders, None)


def _joined(parts: dict[str, _Part]) -> Tensor | None:
    rows = [part.rows for part in parts.values()]
    if len(rows) == 1:
        return rows[0]  # pixels are large: one part is not copied
    return torch.cat(rows) if rows else None


def _apart(joined: Tensor | None, parts: dict[str, _Part]) -> dict[str, Tensor]:
    """The embeddings of each part in the shape of its field, the inverse of `_joined`."""
    if joined is None:
        return {}
    embeddings = joined.split([len(part.rows) for part in parts.values()])
    return {name: part.in_place(rows) for (name, part), rows in zip(parts.items(), embeddings)}


def _beside(features: Features) -> dict[str, Tensor]:
    """What a model gives besides embeddings, as far as it has it."""
    values = {name: getattr(features, name) for name in (*OF_PAIRS, *NUMBERS)}
    return {name: value for name, value in values.items() if value is not None}
