"""Rows of further modalities beside the shards of an evaluation set, embedded by the model's towers
for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlp.data.index import located
from vlp.data.modalities import Further, Rows, Stored, check, side_by_side
from vlp.eval import embed
from vlp.eval.datasets.source import Source
from vlp.eval.embed import Context
from vlp.eval.models import Encoder
from vlp.eval.pictures import DataError


@dataclass
class Beside:
    """The further modalities of a set's records."""

    rows: dict[str, Rows]  # by name
    places: list[tuple[int, int]]  # of each record: the number of its shard, and its place there


def read(source: Source, folders: Mapping[str, str]) -> Beside:
    """Find the rows of all records; DataError where they are not of the set's shards."""
    if not folders:
        return Beside({}, [])
    paths = list(dict.fromkeys(record.picture.path for record in source.records))
    if not all(path.endswith(".tar") for path in paths):
        raise DataError(
            f"rows of modalities lie beside shards, and {source.name} is none; give a folder of "
            "tars, or pack it with `vlp data pack`"
        )

    try:
        shards = located([Path(path) for path in paths])
        rows = {name: Rows(folder, paths, shards) for name, folder in folders.items()}
    except (OSError, ValueError) as error:
        raise DataError(str(error)) from None

    places, number = [], {path: s for s, path in enumerate(paths)}
    seen = [0] * len(paths)
    for record in source.records:
        shard = number[record.picture.path]
        places.append((shard, seen[shard]))
        seen[shard] += 1

    # Rows are found by their numbers, which are those of all samples.
    incomplete = [path for path, shard, n in zip(paths, shards, seen) if shard.count != n]
    if incomplete:
        raise DataError(
            f"{incomplete[0]} has samples that the set leaves out, so that its rows of modalities "
            "cannot be told apart; write the shard anew without them"
        )
    return Beside(rows, places)


def digest(beside: Beside) -> str:
    """Of the content of all files of rows; "" without any."""
    if not beside.rows:
        return ""
    content = hashlib.sha256()
    for name, rows in sorted(beside.rows.items()):
        content.update(name.encode())
        for path in rows.files:
            content.update(path.read_bytes())
    return content.hexdigest()


def embedded(
    encoder: Encoder, beside: Beside, context: Context
) -> dict[str, tuple[Tensor, Tensor]]:
    """[n, D] unit rows of each modality, and which records have it, [n] bool."""
    if not beside.rows:
        return {}
    shapes = dict(sorted(encoder.modality_shapes.items()))
    without = sorted(beside.rows.keys() - shapes.keys())
    if without:
        raise DataError(
            f"{encoder.name} has no tower for {', '.join(without)}; it reads "
            f"{', '.join(['image', 'text', *shapes])} (a run with model.heads.modalities; exports "
            "have no such towers)"
        )
    try:
        check([beside.rows], {name: shapes[name] for name in beside.rows})
    except ValueError as error:
        raise DataError(str(error)) from None

    def prepare(place: tuple[int, int]) -> Further:
        return side_by_side(Stored(beside.rows, *place), shapes)

    def encode(batch: list[Further]) -> Tensor:
        rows, lengths = (
            torch.stack([torch.from_numpy(of_one[k]) for of_one in batch]) for k in (0, 1)
        )
        # Beside the embeddings whether there is anything that they are of.
        embeddings = encoder.encode_others(rows, lengths)
        has = (lengths > 0).unsqueeze(2).to(embeddings)
        return torch.cat([embeddings, has], 2).flatten(1)

    rows = embed.others(beside.places, prepare, encode, context)
    of_modality = rows.unflatten(1, (len(shapes), -1)).unbind(1)
    by_name = dict(zip(shapes, of_modality, strict=True))
    return {name: (by_name[name][:, :-1], by_name[name][:, -1] > 0) for name in beside.rows}
