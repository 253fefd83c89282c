"""Further modalities of the samples of shards: rows in time that lie beside them, written by `vlp
data modality`.

DIR/STEM.safetensors belongs to the shard STEM.tar:
    rows      [n, T, F] float16 in the order of its n usable samples, T rows in time of F numbers
              each (log-mel frames of a sound, embeddings of a video's frames), or [n, F]
    length    [n] int32: how many of the T rows a sample has; 0: it lacks the modality. Without it
              samples whose rows are all zeros lack it
    metadata  "keys" (SHA-256 in hex of the samples' keys, one a line); "model": what made them

A modality that the model decodes is made of members of the samples instead (vlp.data.sounds,
vlp.data.further_members), whatever lies beside the shards.

A batch carries the modalities that the model reads side by side, [b, S], in the order of their
names, and their lengths, [b, O].
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import safe_open

from vlp import dist, log
from vlp.config import Frames, Members, Sound
from vlp.data import frames, sounds
from vlp.data.embedded import files_beside
from vlp.data.members import SOUND_TYPES
from vlp.data.rows import Shard
from vlp.data.tensor_file import header, of_each, part
from vlp.types import Sample

Shapes = Mapping[str, tuple[int, int]]  # (T, F) of each modality that a model reads, by name


class Table(Protocol):
    """The members of some shards' samples that make one modality."""

    n_samples: int  # that have it
    extensions: set[str]


class Rows:
    """One modality of the samples of some shards. Raises ValueError where it does not fit them."""

    def __init__(self, folder: str, paths: Sequence[str], shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.files = files_beside(folder, paths, "modality")

        shapes = dict(zip(of_each(_check, self.files, shards), self.files))
        if len(shapes) > 1:
            listed = "; ".join(f"{path}: {list(shape)}" for shape, path in shapes.items())
            raise ValueError(
                f"modality {folder!r} has rows of several shapes ({listed}); make all files anew "
                "with the same settings"
            )
        [self.shape] = shapes  # (T, F)
        self._times = [path.stat().st_mtime_ns for path in self.files]

    def of(self, shard: int, i: int) -> tuple[np.ndarray, int]:
        """Rows [T, F] float32 of sample i of a shard, and how many it has."""
        file = _opened(self.files[shard], self._times[shard])
        rows = file.get_slice("rows")[i].astype(np.float32).reshape(self.shape)
        if "length" in set(file.keys()):
            return rows, int(file.get_slice("length")[i : i + 1][0])
        return rows, self.shape[0] if rows.any() else 0


class Further(NamedTuple):
    """The further modalities of one sample side by side, in the order of their names."""

    rows: np.ndarray  # [S] float32, zeros where it has none
    lengths: np.ndarray  # [O] int64: how many rows of each it has
    frames: Sequence[int] = ()  # which frames of its video are looked at


class Stored(NamedTuple):
    """The further modalities of one sample."""

    of: Mapping[str, Rows]
    shard: int
    place: int  # of the sample in its shard


def check(
    offered: Sequence[Mapping[str, Rows]],  # of each source
    shapes: Shapes,
    decoded: Collection[str] = (),
) -> None:
    """Refuse modalities that no source has, or the model does not read, or of another shape.

    `decoded`: those that are made of members of the samples.
    """
    named = sorted({name for of_source in offered for name in of_source})
    for name in sorted(set(named).intersection(decoded)):
        raise ValueError(
            f"a source names rows of {name!r}, which the model makes of the samples' members; "
            f"leave {name} out of the source's modalities, or give model.heads.modalities.{name} "
            "features and length in place of sound or frames"
        )
    for name in sorted(shapes.keys() - set(named) - set(decoded)):
        raise ValueError(
            f"model.heads.modalities reads {name!r}, which no source has; name the folder of its "
            f"rows: sources: [{{name: shards, path: …, modalities: {{{name}: DIR}}}}], or read "
            f"members of the samples: model.heads.modalities.{name}.sound, or frames"
        )
    for name in sorted(set(named) - shapes.keys()):
        raise ValueError(
            f"a source has the modality {name!r}, which the model does not read; add "
            f"model.heads.modalities.{name}, or leave it out of the source"
        )

    for of_source in offered:
        for name, rows in of_source.items():
            (length, features), (most, expected) = rows.shape, shapes[name]
            if features != expected or length > most:
                raise ValueError(
                    f"{rows.folder} holds {length} rows of {features} numbers a sample, and the "
                    f"model reads up to {most} of {expected}; set model.heads.modalities.{name} to "
                    f"{{features: {features}, length: {length}}}, or make the rows anew"
                )


def check_members(
    sources: Sequence[str],  # their kinds
    found: Sequence[Mapping[str, Table]],  # in each
    wanted: Mapping[str, Members],
) -> None:
    """Refuse members that no sample of any source has, or that need a package that is absent; tells
    of sources in which members cannot be looked for.
    """
    for name, members in wanted.items():
        tables = [of_source[name] for of_source in found if name in of_source]
        if not any(table.n_samples for table in tables):
            raise ValueError(
                f"model.heads.modalities.{name} reads {_said(members)} among the samples' members, "
                "and no sample of any source has them beside KEY.jpg"
            )
        if isinstance(members, Sound):
            extensions = {extension for table in tables for extension in table.extensions}
            sounds.check_installed(extensions, name)

    for source, of_source in zip(sources, found):
        if not of_source and dist.is_main():
            log.warn(
                f"the samples of the source {source} lack {', '.join(wanted)}: sounds and frames "
                "are read of shards alone (the sources shards and remote)"
            )


def _said(members: Members) -> str:
    if isinstance(members, Frames):
        return "frames (KEY.000.jpg, KEY.001.jpg, …)"
    name = f"{members.member}." if members.member else ""
    return f"sounds (KEY.{name}wav, {', '.join(SOUND_TYPES[1:])})"


def further(
    sample: Sample,
    shapes: Shapes,
    decoded: Mapping[str, Members],
    chance: Callable[[str], random.Random] | None,
) -> Further:
    """What a sample has of the modalities that a model reads; ValueError where it cannot be used.

    chance: of what is taken of each; None: what lies in the middle.
    """
    rows, places = {}, []
    for name in decoded.keys() & sample.members.keys():
        files, members = sample.members[name], decoded[name]
        draws = None if chance is None else chance(name)
        if isinstance(members, Frames):
            places = frames.chosen(len(files.members), members.n, draws)
            # Their embeddings are the image tower's.
            rows[name] = np.zeros((len(places), 0), np.float32)
        else:
            rows[name] = sounds.rows_of(files, members, draws)
    return side_by_side(sample.modalities, shapes, rows)._replace(frames=places)


def side_by_side(
    stored: Stored | None,
    shapes: Shapes,
    decoded: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Further:
    """What a sample has of the modalities that a model reads, stored or made of its members;
    ValueError for NaN or infinity.
    """
    parts, lengths = [], []
    for name, (most, features) in sorted(shapes.items()):
        whole, length = np.zeros((most, features), np.float32), 0
        if name in decoded:
            length = len(decoded[name])
            whole[:length] = decoded[name]
        elif stored is not None and name in stored.of:
            rows, length = stored.of[name].of(stored.shard, stored.place)
            whole[:length] = rows[:length]
        parts.append(whole.ravel())
        lengths.append(length)
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("the rows of a modality hold NaN or infinity; make them anew")
    return Further(np.concatenate(parts), np.array(lengths, np.int64))


def _check(path: Path, shard: Shard) -> tuple[int, int]:
    """(T, F) of the rows of a shard."""
    remedy = f"make it with `vlp data modality` from the shard {shard.name}"
    try:
        about = header(path)
        keys = about.metadata["keys"]
        n, *shape = about.shapes["rows"]
        lengths = np.zeros(n, np.int32)
        if "length" in about.shapes:
            lengths = np.frombuffer(part(path, *about.places["length"]), "<i4")
        n_rows, n_features = shape if len(shape) == 2 else (1, *shape)
        right = lengths.shape == (n,) and lengths.min(initial=0) >= 0
        right = right and lengths.max(initial=0) <= n_rows
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} holds no rows of a modality ({type(error).__name__}: {error}); {remedy}"
        ) from None

    # Rows are found by their number alone: those of other samples would be paired in silence.
    if not right or n != shard.count or keys != shard.keys:
        raise ValueError(
            f"{path} holds {n} rows of other samples than the {shard.count} of {shard.name}, or "
            f"lengths beyond them; {remedy}"
        )
    return n_rows, n_features


# A process keeps this many files mapped; only the rows that are read take memory.
@lru_cache(maxsize=128)
def _opened(path: Path, mtime_ns: int) -> Any:
    return safe_open(path, "numpy")
