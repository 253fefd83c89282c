"""The index of a folder of shards: where every usable sample lies, so that counts and random access
read no tar.

One file, `_index.bin`, lies beside the shards (or in the cache where the folder cannot be written):
a check sum, a JSON header naming each shard with its size, times of change, number of samples and
what was left out, then 24 bytes a sample (`vlp.data.rows`).

A shard whose size or time of modification differs from the header's, or that is not named there,
is scanned again: it is read once, whole, because every sample gets a digest. So foreign shards need
no preparation, and an index can be deleted at any time; one of an older version is made anew.

Where only the inode's time (ctime) differs, which no tool can set back, the tar was copied with its
times, or replaced in place: some of its samples are compared with their digests, and where one
differs the whole is scanned again. A change that this misses is met when the sample is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from vlp import log
from vlp.caches import cache_folder
from vlp.data.digests import UNKNOWN
from vlp.data.paths import unreadable
from vlp.data.rows import EXTENT, FURTHER_LABELS, ROW, Shard
from vlp.data.scan import scan
from vlp.files import write_atomically

NAME = "_index.bin"
_FAMILY = b"vlp shard index "
_VERSION = b"5"
# An index that does not know a label would say that no sample has it.
_MAGIC = _FAMILY + b" ".join([_VERSION, *map(str.encode, FURTHER_LABELS)]) + b"\n"
_BEFORE = (_FAMILY + b"3\n", _FAMILY + b"4\n")  # without digests
_ROW_BEFORE = struct.Struct("<QIIBBH")  # as ROW, without the digest
_SUM_BYTES = 32
_N_COMPARED = 16  # samples of a tar whose inode changed


def index(paths: list[Path]) -> list[Shard]:
    """The shards at `paths`, in that order, scanning those that the folders' indices do not know.

    Raises ValueError for what is no tar to read from.
    """
    known: dict[Path, dict[str, Shard]] = {}  # by folder and name
    shards: list[Shard] = []
    changed: set[Path] = set()
    try:
        for path in paths:
            folder = path.parent
            if folder not in known:
                known[folder] = _load(folder)
            try:
                status = path.stat()
            except OSError as error:
                raise ValueError(unreadable(path, error)) from None

            # Of a thousand shards one may be new: only that one is read.
            shard = known[folder].get(path.name)
            if shard is None or not _is_current(shard, path, status):
                shard = known[folder][path.name] = scan(path)
                changed.add(folder)
            elif shard.ctime_ns != status.st_ctime_ns:
                shard.ctime_ns = status.st_ctime_ns
                changed.add(folder)
            shards.append(shard)
    finally:  # where one cannot be read, the others are known the next time
        for folder in changed:
            _save(folder, known[folder])
    return shards


def _is_current(shard: Shard, path: Path, status: os.stat_result) -> bool:
    """Whether a tar is as it was when it was indexed, as far as can be told without reading it."""
    if (shard.size, shard.mtime_ns) != (status.st_size, status.st_mtime_ns):
        return False
    if shard.ctime_ns == status.st_ctime_ns:
        return True

    step = max(1, shard.count // _N_COMPARED)
    try:
        with path.open("rb") as file:
            for i in range(0, shard.count, step):
                shard.sample(file, i)
    except (OSError, ValueError):
        return False
    return shard.count > 0


def _places(folder: Path) -> list[Path]:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return [folder / NAME, cache_folder() / "index" / f"{digest}.bin"]


def _load(folder: Path) -> dict[str, Shard]:
    for place in _places(folder):
        try:
            data = place.read_bytes()
        except OSError:
            continue  # there is none

        try:
            return parse_index(data)
        except OldIndex as error:
            log.warn(f"{place} is {error}; its shards are read anew")
        except ValueError as error:
            log.warn(f"{place} is not a usable index ({error}); its shards are scanned again")
    return {}


class OldIndex(ValueError):
    """An index of another version of this project."""


def parse_index(data: bytes, undigested: bool = False) -> dict[str, Shard]:
    """The shards that an index file describes, by name; raises ValueError, OldIndex for another
    version's.

    `undigested`: also of the versions before, whose samples have no digests and are not checked.
    """
    magics = (_MAGIC, *_BEFORE) if undigested else (_MAGIC,)
    magic = next((magic for magic in magics if data.startswith(magic)), None)
    if magic is None:
        if data.startswith(_FAMILY):
            raise OldIndex(_of_which_version(data))
        raise ValueError("it starts with other bytes")

    without = magic in _BEFORE
    row_bytes = _ROW_BEFORE.size if without else ROW.size
    # A damaged row would lead to the bytes of other samples.
    start = len(magic) + _SUM_BYTES
    if hashlib.sha256(data[start:]).digest() != data[len(magic) : start]:
        raise ValueError("its check sum is that of other bytes")

    position = start + 8
    length = int.from_bytes(data[start:position], "little")
    shards = []
    try:
        header = json.loads(data[position : position + length])
        position += length
        for fields in header:
            end_of_rows = position + fields["count"] * row_bytes
            end = end_of_rows + fields.pop("n_extents") * EXTENT.size
            rows = data[position:end_of_rows]
            if without:
                rows = _with_unknown_digests(rows)
            shards.append(Shard(**fields, rows=rows, extents=data[end_of_rows:end]))
            position = end
    except (TypeError, KeyError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"its header is none ({type(error).__name__})") from None

    if position != len(data):
        raise ValueError(f"it has {len(data)} bytes instead of {position}")
    return {shard.name: shard for shard in shards}


def _of_which_version(data: bytes) -> str:
    """Whose index it is that starts with the family's name, in words."""
    # The labels that are known are part of the magic, after the number.
    number = data[len(_FAMILY) :].split(maxsplit=1)[0].rstrip(b"\n")
    if number == _VERSION:
        return "of a version that knows other labels"
    if number.isdigit() and int(number) > int(_VERSION):
        return "of a newer version"
    return "of an older version, without digests"


def _with_unknown_digests(rows: bytes) -> bytes:
    """Rows of the version before as rows of this one."""
    return b"".join(
        ROW.pack(offset, length, form, UNKNOWN, *rest)
        for offset, length, form, *rest in _ROW_BEFORE.iter_unpack(rows)
    )


def save_index(path: Path, shards: dict[str, Shard]) -> None:
    """Write an index file; raises OSError."""
    header: list[dict[str, Any]] = []
    body: list[bytes] = []
    for shard in shards.values():
        # Rows and extents follow the header as bytes; JSON would triple them.
        fields = dict(vars(shard))
        del fields["rows"], fields["extents"]
        header.append({**fields, "n_extents": len(shard.extents) // EXTENT.size})
        body += [shard.rows, shard.extents]

    encoded = json.dumps(header).encode()
    content = len(encoded).to_bytes(8, "little") + encoded + b"".join(body)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _MAGIC + hashlib.sha256(content).digest() + content)


def _save(folder: Path, shards: dict[str, Shard]) -> None:
    """Write the index of a folder's shards, without those that are gone, where that is possible."""
    kept = {name: shards[name] for name in sorted(shards) if (folder / name).exists()}

    beside, cached = _places(folder)
    try:
        return save_index(beside, kept)
    except OSError:
        pass  # a read-only folder is normal for shared data: the cache is the second place

    try:
        save_index(cached, kept)
    except OSError as error:
        log.warn(f"the index of {folder} could not be saved ({error}); it is built again next time")
