"""Further modalities of the samples of an evaluation set, embedded by the model's towers for them:
rows beside the shards, or members of the samples, decoded as in training but from the middle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlp.config import Frames
from vlp.data import sounds
from vlp.data.frames import chosen
from vlp.data.further_members import Files, Member, members_of, of_tar
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
    # of each record: the number of its shard, and its place there; empty where no rows are read
    places: list[tuple[int, int]]
    decoded: list[str]  # names of those that members of the samples make
    # of each record: its tar and its further members; empty where none are read
    members: list[tuple[str, list[Member]]]

    @property
    def names(self) -> list[str]:
        """Of all that are scored."""
        return [*self.rows, *self.decoded]


def read(source: Source, folders: Mapping[str, str | None]) -> Beside:
    """Find the rows and members of all records; DataError where they are not of the set's shards.

    folders: of the rows, by name; None: members of the samples.
    """
    if not folders:
        return Beside({}, [], [], [])
    paths = list(dict.fromkeys(record.picture.path for record in source.records))
    if not all(path.endswith(".tar") for path in paths):
        raise DataError(
            f"further modalities lie in shards or beside them, and {source.name} is none; give a "
            "folder of tars, or pack it with `vlp data pack`"
        )

    of_rows = {name: folder for name, folder in folders.items() if folder is not None}
    rows, places = _stored(source, paths, of_rows) if of_rows else ({}, [])
    decoded = [name for name, folder in folders.items() if folder is None]
    return Beside(rows, places, decoded, _members(source, paths) if decoded else [])


def _members(source: Source, paths: Sequence[str]) -> list[tuple[str, list[Member]]]:
    """The tar of each record, and its further members."""
    tars = {path: of_tar(Path(path)) for path in paths}
    for path, of_one in tars.items():
        if of_one.damage:
            raise DataError(f"{path}: members after damage ({of_one.damage}); restore the shard")

    members = []
    for record in source.records:
        path, of_one = record.picture.path, tars[record.picture.path]
        key = of_one.pictures.get(record.picture.offset)
        members.append((path, [] if key is None else of_one.members.get(key, [])))
    return members


def _stored(
    source: Source, paths: Sequence[str], folders: Mapping[str, str]
) -> tuple[dict[str, Rows], list[tuple[int, int]]]:
    """The rows by name, and where those of each record lie."""
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
    return rows, places


def digest(beside: Beside, encoder: Encoder) -> str:
    """Of the content of all files of rows, and of all members that the model reads; "" without
    any.
    """
    if not beside.names:
        return ""
    content = hashlib.sha256()
    for name, rows in sorted(beside.rows.items()):
        content.update(name.encode())
        for path in rows.files:
            content.update(path.read_bytes())

    for name in sorted(beside.decoded):
        content.update(name.encode())
        for number in range(len(beside.members)):
            files = _files(beside, number, encoder, name)
            data = [files.read(i) for i in range(len(files.members))]
            # What a sample lacks must not be told as what the next one has.
            content.update(b"".join(len(one).to_bytes(8, "little") + one for one in data) or b"-")
    return content.hexdigest()


def _files(beside: Beside, number: int, encoder: Encoder, name: str) -> Files:
    """The members of a record that make a modality."""
    path, of_sample = beside.members[number]
    return Files(path, members_of(of_sample, encoder.decoded_modalities[name]))


class _Prepared(NamedTuple):
    """A record as its batch takes it."""

    further: Further
    frames: Tensor | None  # [F, 3, H, W]; None: no video is scored


def embedded(
    encoder: Encoder, beside: Beside, context: Context
) -> dict[str, tuple[Tensor, Tensor]]:
    """[n, D] unit rows of each modality, and which records have it, [n] bool."""
    if not beside.names:
        return {}
    shapes = dict(sorted(encoder.modality_shapes.items()))
    _check(encoder, beside, shapes)

    def prepare(number: int) -> _Prepared:
        stored = Stored(beside.rows, *beside.places[number]) if beside.places else None
        decoded: dict[str, np.ndarray] = {}
        frames = None
        for name in beside.decoded:
            files, members = _files(beside, number, encoder, name), encoder.decoded_modalities[name]
            with _naming(name, files):
                if isinstance(members, Frames):
                    frames, n_frames = _frames(files, members.n, encoder)
                    decoded[name] = np.zeros((n_frames, 0), np.float32)
                else:
                    decoded[name] = sounds.rows_of(files, members, None)
        return _Prepared(side_by_side(stored, shapes, decoded), frames)

    def encode(batch: list[_Prepared]) -> Tensor:
        rows, lengths = (
            torch.stack([torch.from_numpy(of_one.further[k]) for of_one in batch]) for k in (0, 1)
        )
        videos = [of_one.frames for of_one in batch if of_one.frames is not None]
        frames = torch.stack(videos) if videos else None
        # Beside the embeddings whether there is anything that they are of.
        embeddings = encoder.encode_others(rows, lengths, frames)
        has = (lengths > 0).unsqueeze(2).to(embeddings)
        return torch.cat([embeddings, has], 2).flatten(1)

    numbers = range(len(beside.places or beside.members))
    rows = embed.others(numbers, prepare, encode, context)
    of_modality = rows.unflatten(1, (len(shapes), -1)).unbind(1)
    by_name = dict(zip(shapes, of_modality, strict=True))
    return {name: (by_name[name][:, :-1], by_name[name][:, -1] > 0) for name in beside.names}


def _check(encoder: Encoder, beside: Beside, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse modalities that the model has no tower for, or reads otherwise."""
    without = sorted(set(beside.names) - shapes.keys())
    if without:
        raise DataError(
            f"{encoder.name} has no tower for {', '.join(without)}; it reads "
            f"{', '.join(['image', 'text', *shapes])} (a run with model.heads.modalities; exports "
            "have no such towers)"
        )
    stored = sorted(set(beside.decoded) - encoder.decoded_modalities.keys())
    if stored:
        raise DataError(
            f"{encoder.name} reads stored rows of {', '.join(stored)}, no members of samples; name "
            f"their folder: modalities={{{stored[0]}: DIR}}"
        )
    videos = [name for name in beside.rows if not shapes[name][1]]
    if videos:
        raise DataError(
            f"{encoder.name} embeds the frames of {videos[0]} itself, and reads no stored rows of "
            f"it; write modalities={{{videos[0]}: null}}"
        )
    try:
        check([beside.rows], {name: shapes[name] for name in beside.rows})
    except ValueError as error:
        raise DataError(str(error)) from None


def _frames(files: Files, most: int, encoder: Encoder) -> tuple[Tensor, int]:
    """Pixels [F, 3, H, W] of a record's video, zeros behind its last frame, and how many it has."""
    assert encoder.prepare_frame is not None, "asked of a model that reads frames"
    places = chosen(len(files.members), most, None)
    pictures = [encoder.prepare_frame(files.read(place)) for place in places]
    whole = torch.zeros(most, *encoder.frame_shape, dtype=torch.uint8)
    if pictures:
        whole[: len(pictures)] = torch.stack(pictures)
    return whole, len(places)


@contextmanager
def _naming(name: str, files: Files) -> Iterator[None]:
    """DataError, which names the place, for a record's members that cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        place = f"{files.path}, byte {files.members[0].offset}"
        raise DataError(f"{name} at {place}: {error}; repair or remove it") from None
