"""The file of an index: what is known of each shard, and then 24 bytes a sample.

    magic | SHA-256 of the header | bytes of the header | header (JSON) | rows and extents, by shard

The header has its own check sum, and names one for the rows and extents of each shard. So a start
reads and checks the header alone, whose size is that of the number of shards; the rows of a shard
are checked when they are first read. Files of the versions before, which had one check sum of
everything, are read whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from vlp.data.digests import UNKNOWN
from vlp.data.rows import EXTENT, FURTHER_LABELS, ROW, Kind, Shard, Stored
from vlp.data.summary import summarize
from vlp.files import replacing

NAME = "_index.bin"
_FAMILY = b"vlp shard index "
VERSION = 6
_DIGESTED = 5  # the first version whose samples have digests; it had one check sum of everything
UNDIGESTED = 3  # the first that is read at all
_SUM_BYTES = 32


def _magic(version: int) -> bytes:
    # An index that does not know a label would say that no sample has it.
    labels = map(str.encode, FURTHER_LABELS)
    return _FAMILY + b" ".join([str(version).encode(), *labels]) + b"\n"


_MAGIC = _magic(VERSION)
_MAGICS = {6: _MAGIC, 5: _magic(5), 4: _FAMILY + b"4\n", 3: _FAMILY + b"3\n"}
_ROW_BEFORE = struct.Struct("<QIIBBH")  # as ROW, without the digest
# What the header keeps of a shard in a way of its own, or not at all.
_APART = ("forms", "rows", "extents", "stored")


_MOST_OPEN = 64  # files of a process; a folder of shards has one or two
_MAGIC_BYTES = 1024  # that a magic has at most
_handles: dict[tuple[str, bytes], Handle] = {}


class OldIndex(ValueError):
    """An index of another version of this project."""


class Handle:
    """An open index file, which stays readable where another takes its place."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "fd"):  # opening may have failed
            os.close(self.fd)

    def read(self, offset: int, n_bytes: int) -> bytes:
        """So many bytes from `offset` on; ValueError where there are fewer."""
        data = os.pread(self.fd, n_bytes, offset)
        if len(data) != n_bytes:
            raise ValueError(f"{self.path} ends before byte {offset + n_bytes}")
        return data


def opened(path: str, head: bytes, again: bool = False) -> Handle:
    """The file at `path` whose header has the check sum `head`, an index or one of
    `vlp.data.member_file`, which this process may have opened before another took its place; raises
    OSError, ValueError where it is another by now. `again`: what was opened before is not used.
    """
    handle = None if again else _handles.get((path, head))
    if handle is None:
        # Read in pieces instead of mapped: on a network a mapped file that was replaced ends the
        # process by a signal, where reading raises an error.
        handle = Handle(path)
        beginning = os.pread(handle.fd, _MAGIC_BYTES, 0)
        if _head(beginning) != head:
            raise ValueError(f"{path} was replaced")

        while len(_handles) >= _MOST_OPEN:
            _handles.pop(next(iter(_handles)))
        _handles[path, head] = handle
    return handle


def _head(beginning: bytes) -> bytes:
    """The check sum of the header, which lies behind the magic's line."""
    place = beginning.find(b"\n") + 1
    return beginning[place : place + _SUM_BYTES]


def load(shard: Shard) -> None:
    """Read the rows and extents of a shard from where they are stored; raises OSError, ValueError
    where they are damaged.
    """
    if shard.stored is None or shard.rows:
        return
    stored = shard.stored
    data = checked(opened(stored.path, stored.head), stored)
    n_rows = stored.n_bytes - stored.n_extents * EXTENT.size
    shard.rows, shard.extents = data[:n_rows], data[n_rows:]


def checked(handle: Handle, stored: Stored) -> bytes:
    """The rows and extents of a shard; ValueError where their check sum is another's."""
    data = handle.read(stored.offset, stored.n_bytes)
    if hashlib.sha256(data).hexdigest() != stored.digest:
        raise ValueError(f"{stored.path} is damaged")
    return data


def open_index(path: Path, oldest: int = _DIGESTED) -> dict[str, Shard]:
    """The shards of the index file at `path`, by name; their rows stay there, but for those of a
    version before, which is read whole. Raises OSError, ValueError, and OldIndex for another
    version's that is not read.

    oldest: the version to read from on; before `_DIGESTED` samples have no digests, and are not
    checked.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        shards = _read(file, size, os.fspath(path), oldest)

    # Kept open from now on, because another process may replace it.
    for shard in shards.values():
        if shard.stored is not None:
            opened(shard.stored.path, shard.stored.head, again=True)
            break
    return shards


def parse_index(data: bytes, oldest: int = _DIGESTED) -> dict[str, Shard]:
    """The shards of an index file with all their rows; raises as `open_index`."""
    shards = _read(BytesIO(data), len(data), "", oldest)
    for shard in shards.values():
        if shard.stored is not None:
            stored, shard.stored = shard.stored, None
            body = data[stored.offset : stored.offset + stored.n_bytes]
            if hashlib.sha256(body).hexdigest() != stored.digest:
                raise ValueError(f"the rows of {shard.name} are damaged")
            n_rows = stored.n_bytes - stored.n_extents * EXTENT.size
            shard.rows, shard.extents = body[:n_rows], body[n_rows:]
    return shards


def _read(file: BinaryIO, size: int, path: str, oldest: int) -> dict[str, Shard]:
    magics = {version: magic for version, magic in _MAGICS.items() if version >= oldest}
    line = file.read(max(map(len, _MAGICS.values())))
    version = next((v for v, magic in magics.items() if line.startswith(magic)), None)
    if version is None:
        if line.startswith(_FAMILY):
            raise OldIndex(_of_which_version(line))
        raise ValueError("it starts with other bytes")

    file.seek(len(magics[version]))
    try:
        if version == VERSION:
            shards = _with_places(file, size, path)
        else:
            shards = _whole(file.read(), version)
    except (TypeError, KeyError, IndexError, RecursionError, AttributeError) as error:
        raise ValueError(f"its header is none ({type(error).__name__})") from None
    # Of those an earlier reader may have left out captions that are read by now.
    return {name: shard for name, shard in shards.items() if not shard.is_outdated()}


def _with_places(file: BinaryIO, size: int, path: str) -> dict[str, Shard]:
    """The shards of this version's file, without rows, from behind its magic on."""
    head, header = read_header(file, size)
    position = file.tell()
    forms = header["forms"]
    shards = {}
    for entry in header["shards"]:
        digest, n_extents = entry.pop("digest"), entry.pop("n_extents")
        entry["forms"] = forms[entry.pop("form_list")]
        entry["kinds"] = [Kind(*kind) for kind in entry.get("kinds", ())]
        n_bytes = entry.get("count", 0) * ROW.size + n_extents * EXTENT.size
        stored = Stored(path, head, position, n_bytes, n_extents, digest)
        shards[entry["name"]] = Shard(**entry, stored=stored)
        position += n_bytes

    # A file that was cut would be noticed in mid-run only.
    if position != size:
        raise ValueError(f"it has {size} bytes instead of {position}")
    return shards


def read_header(file: BinaryIO, size: int) -> tuple[bytes, Any]:
    """The check sum of a header, and what it says, from behind the magic on; ValueError where these
    are other bytes. Of a file of `size` bytes, which then stands behind it.
    """
    head = file.read(_SUM_BYTES)
    length = file.read(8)
    encoded = file.read(min(int.from_bytes(length, "little"), size))
    if hashlib.sha256(length + encoded).digest() != head:
        raise ValueError("the check sum of its header is that of other bytes")
    return head, json.loads(encoded)


def _whole(data: bytes, version: int) -> dict[str, Shard]:
    """The shards of an older version's file, with their rows, from behind its magic on."""
    without = version < _DIGESTED
    row_bytes = _ROW_BEFORE.size if without else ROW.size
    if hashlib.sha256(data[_SUM_BYTES:]).digest() != data[:_SUM_BYTES]:
        raise ValueError("its check sum is that of other bytes")

    start = _SUM_BYTES + 8
    position = start + int.from_bytes(data[_SUM_BYTES:start], "little")
    shards = {}
    for entry in json.loads(data[start:position]):
        end_of_rows = position + entry["count"] * row_bytes
        end = end_of_rows + entry.pop("n_extents") * EXTENT.size
        rows = data[position:end_of_rows]
        if without:
            rows = _with_unknown_digests(rows)
        shard = Shard(**entry, rows=rows, extents=data[end_of_rows:end])
        position = end

        if len(shard.rows) != shard.count * ROW.size:
            raise ValueError(f"the rows of {shard.name} are not there")
        summarize(shard)
        shards[shard.name] = shard

    if position != len(data):
        raise ValueError(f"it has {len(data)} bytes instead of {position}")
    return shards


def _of_which_version(line: bytes) -> str:
    """Whose index it is that starts with the family's name, in words."""
    # The labels that are known are part of the magic, after the number.
    number = line[len(_FAMILY) :].split(maxsplit=1)[0].rstrip(b"\n")
    if number == str(VERSION).encode():
        return "of a version that knows other labels"
    if number.isdigit() and int(number) > VERSION:
        return "of a newer version"
    return "of an older version, without digests or with other labels"


def _with_unknown_digests(rows: bytes) -> bytes:
    """Rows of an undigested version as rows of this one."""
    return b"".join(
        ROW.pack(offset, length, form, UNKNOWN, *rest)
        for offset, length, form, *rest in _ROW_BEFORE.iter_unpack(rows)
    )


def save_index(path: Path, shards: Mapping[str, Shard]) -> None:
    """Write an index file, and let the shards leave their rows there; raises OSError, ValueError.

    Rows that lie in another index file are copied from it, a shard at a time.
    """
    bodies = []
    for shard in shards.values():
        if shard.stored is not None and not shard.rows:
            bodies.append(Body(shard.stored.n_extents, shard.stored.digest))
        else:
            digest = hashlib.sha256(shard.rows + shard.extents).hexdigest()
            bodies.append(Body(len(shard.extents) // EXTENT.size, digest))

    beginning = header(list(shards.values()), bodies)
    head, extents = write(path, beginning, map(_parts, shards.values()))

    # Only where the file is complete.
    place = os.fspath(path)
    for shard, body, (offset, n_bytes) in zip(shards.values(), bodies, extents):
        stored = Stored(place, head, offset, n_bytes, *body)
        shard.rows, shard.extents, shard.stored = b"", b"", stored
    opened(place, head, again=True)


def write(
    path: Path, beginning: bytes, bodies: Iterable[Iterable[bytes]]
) -> tuple[bytes, list[tuple[int, int]]]:
    """Write a file that starts so (`framed`), with bodies in parts. Returns the header's check sum,
    and where each body lies: (offset, bytes).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    extents = []
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(beginning)
        for parts in bodies:
            offset = file.tell()
            for part in parts:
                file.write(part)
            extents.append((offset, file.tell() - offset))
    return _head(beginning), extents


def framed(magic: bytes, encoded: bytes) -> bytes:
    """The beginning of a file of this form, up to its first body."""
    length = len(encoded).to_bytes(8, "little")
    return magic + hashlib.sha256(length + encoded).digest() + length + encoded


class Body(NamedTuple):
    """What the header says of the rows and extents of a shard."""

    n_extents: int
    digest: str  # SHA-256, in hex


def header(shards: Sequence[Shard], bodies: Sequence[Body]) -> bytes:
    """The beginning of an index file, up to the rows of the first shard."""
    forms: dict[str, int] = {}
    entries = []
    for shard, body in zip(shards, bodies):
        # Most shards have the same forms.
        form_list = forms.setdefault(json.dumps(shard.forms), len(forms))
        entries.append({**_changed_fields(shard), **body._asdict(), "form_list": form_list})

    lists = ",".join(forms)
    return framed(_MAGIC, f'{{"forms":[{lists}],"shards":{json.dumps(entries)}}}'.encode())


def _changed_fields(shard: Shard) -> dict[str, Any]:
    """The fields of a shard that go into the header, where they are not what they are at first."""
    entry = {}
    for field in fields(Shard):
        value = getattr(shard, field.name)
        at_first = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name not in _APART and value != at_first:
            entry[field.name] = value
    return entry


def _parts(shard: Shard) -> Iterator[bytes]:
    """The rows and extents of a shard as bytes."""
    if shard.rows or shard.stored is None:
        yield shard.rows
        yield shard.extents
        return

    # Unchecked: a damaged part keeps its check sum, and is noticed when it is read.
    stored = shard.stored
    yield opened(stored.path, stored.head).read(stored.offset, stored.n_bytes)
