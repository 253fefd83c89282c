"""The index of a folder of shards: where every usable sample lies, so that counts and random access read no tar.

One file, `_index.bin`, lies beside the shards (or in the cache where the folder cannot be written): a JSON header naming
each shard with its size, time of change, number of samples and problems, then 16 bytes a sample (`ROW`). A shard whose
size or time differ from the header's, or that is not named there, is scanned again: its headers and small text members
are read once. So foreign shards need no preparation, and an index can be deleted at any time.

What a scan leaves out is in `Shard.problems`, never silent: samples without a usable image or with broken text, later
samples that repeat a key, and what lies next to damage, because it might be half a sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vlp import log
from vlp.data import wrong_captions
from vlp.data.members import (
    BLOCK,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Content,
    DamagedTar,
    Member,
    check_images,
    find_header,
    member_kind,
    read_text,
    split_name,
    walk,
)
from vlp.files import write_atomically

# Offset and length of the sample's members; its captions, the most negatives and the most counterfactuals that belong to
# one of them, flags.
ROW = struct.Struct("<QIBBBB")
CLASS = 1  # flag: the sample's JSON names its class
LABELS = {"score": 2, "negative_scores": 16, "concepts": 32}  # flags: numbers of the sample's JSON that terms read
PICTURED = 4  # flag: it has an image of its first negative
CONTINUES = 8  # flag: its origin is that of the sample before it
NAME = "_index.bin"
_MAGIC = b"vlp shard index 2\n"
_KEPT = 20  # problems of a shard that are kept in words; the others are only counted


@dataclass
class Shard:
    """What the index knows of one tar."""

    name: str
    size: int
    mtime_ns: int
    count: int = 0
    n_left_out: int = 0  # samples that are in the tar but not in `rows`
    n_problems: int = 0  # those, and what is odd or damaged besides
    problems: list[str] = field(default_factory=list)
    keys: str = ""  # SHA-256, in hex, of the keys of `rows`, one a line: what lies beside a shard can name it by them
    rows: bytes = b""

    def report(self, key: str, reason: str) -> None:
        """Count one problem and keep it in words while there are few."""
        self.n_problems += 1
        if len(self.problems) < _KEPT:
            self.problems.append(f"{key}: {reason}" if key else reason)


def index(paths: list[Path]) -> list[Shard]:
    """The shards at `paths`, in that order, scanning those that the folders' indices do not know; raises OSError."""
    known: dict[Path, dict[str, Shard]] = {}
    result, changed = [], set()
    for path in paths:
        if path.parent not in known:
            known[path.parent] = _load(path.parent)
        status = path.stat()
        shard = known[path.parent].get(path.name)
        if shard is None or (shard.size, shard.mtime_ns) != (status.st_size, status.st_mtime_ns):
            shard = scan(path)
            known[path.parent][path.name] = shard
            changed.add(path.parent)
        result.append(shard)
    for folder in changed:
        _save(folder, known[folder])
    return result


def scan(path: Path) -> Shard:
    """Read the headers and texts of one tar; damage costs only the samples beside it."""
    with open(path, "rb", buffering=1 << 18) as file:
        status = os.fstat(file.fileno())
        shard = Shard(path.name, status.st_size, status.st_mtime_ns)
        scanner = _Scanner(file, shard)
        position, suspect = 0, False
        while position < shard.size:
            try:
                for member in walk(file, position, shard.size):
                    suspect = scanner.take(member, suspect)
                break
            except DamagedTar as error:
                shard.report("", str(error))
                scanner.finish(suspect=True)
                suspect = True
                position = find_header(file, error.offset + 1 + (-error.offset - 1) % BLOCK, shard.size)
        if scanner.members and not _ends(file, shard.size):
            shard.report("", "the file ends without the mark of a tar's end, so its last sample may be half")
            suspect = True
        scanner.finish(suspect)
    shard.rows = bytes(scanner.rows)
    shard.count = len(shard.rows) // ROW.size
    shard.keys = hashlib.sha256("\n".join(scanner.seen).encode()).hexdigest()
    return shard


def _ends(file: BinaryIO, size: int) -> bool:
    """Whether the file ends in the zeros that close a tar; one that was cut between two members does not."""
    file.seek(max(0, size - BLOCK))
    return file.read() == bytes(BLOCK)


class _Scanner:
    """Gathers the consecutive members of one key into a row."""

    def __init__(self, file: BinaryIO, shard: Shard) -> None:
        self.file, self.shard = file, shard
        self.rows = bytearray()
        self.seen: dict[str, None] = {}  # keys of the rows, in their order
        self.origin: Any = None  # of the last row; None: it has none
        self.key = ""
        self.members: dict[str, Member] = {}
        self.names: set[str] = set()

    def take(self, member: Member, suspect: bool) -> bool:
        """Add a member; returns whether the sample it belongs to lies next to damage."""
        named = split_name(member.name)
        kind = member_kind(named[1]) if named else None
        if kind is None:
            return suspect
        if named[0] != self.key or member.name in self.names:
            suspect = suspect and not self.members  # the sample after damage has ended: the next one is whole
            self.finish()
            self.key = named[0]
        self.members.setdefault(kind, member)
        self.names.add(member.name)
        return suspect

    def finish(self, suspect: bool = False) -> None:
        """Close the sample in progress: a row, or a problem."""
        key, members = self.key, self.members
        self.key, self.members, self.names = "", {}, set()
        if not members:
            return
        try:
            if suspect:
                raise ValueError("left out, because it lies beside damage and may be half a sample")
            if key in self.seen:
                raise ValueError("a second sample of this key; the first is kept")
            row = self._row(key, members)
        except ValueError as error:
            self.shard.report(key, str(error))
            self.shard.n_left_out += 1
            return
        self.seen[key] = None
        self.rows += row

    def _row(self, key: str, members: dict[str, Member]) -> bytes:
        check_images(members)
        content = Content(key)
        texts = {kind: self._read(member) for kind, member in members.items() if kind not in ("image", "negative")}
        read_text(content, texts)
        for note in content.notes:
            self.shard.report(key, note)
        start, end = min(m.start for m in members.values()), max(m.end for m in members.values())
        if end - start > 2 * MAX_IMAGE_BYTES:
            raise ValueError(f"its members are spread over {end - start} bytes")
        meta, before = content.meta, self.origin
        self.origin = meta.get("origin")
        flags = (
            CLASS * isinstance(meta.get("class"), str)
            | sum(LABELS[name] for name in labels_of(meta))
            | PICTURED * ("negative" in members)
            | CONTINUES * (self.origin is not None and self.origin == before)
        )
        captions = content.captions
        for problem in wrong_captions.problems(meta, captions):
            self.shard.report(key, problem)
        wrong = [wrong_captions.read(meta, field, captions).most(captions) for field in wrong_captions.LISTS]
        counts = [min(n, 255) for n in (len(captions), *wrong)]
        return ROW.pack(start, end - start, *counts, flags)

    def _read(self, member: Member) -> bytes:
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"a text member of {member.size} bytes, more than {MAX_TEXT_BYTES}")
        self.file.seek(member.offset)
        return self.file.read(member.size)


def labels_of(meta: dict[str, Any]) -> frozenset[str]:
    """Which of LABELS a sample's JSON holds: "score" is a number, the others are lists of numbers.

    A list may be empty only as the scores of no negatives.
    """
    found = {name for name in LABELS if name in meta}
    lists = {name: [meta[name]] if name == "score" else meta[name] for name in found}
    return frozenset(
        name for name, values in lists.items()
        if isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)
        and (values or (name == "negative_scores" and not meta.get("negatives")))
    )  # fmt: skip


def cache_folder() -> Path:
    """Where indices and downloads go that cannot lie beside their data: $VLP_CACHE, else ~/.cache/vlp."""
    return Path(os.environ.get("VLP_CACHE") or Path.home() / ".cache" / "vlp")


def _places(folder: Path) -> list[Path]:
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return [folder / NAME, cache_folder() / "index" / f"{digest}.bin"]


def _load(folder: Path) -> dict[str, Shard]:
    for place in _places(folder):
        try:
            data = place.read_bytes()
        except OSError:
            continue
        try:
            return parse_index(data)
        except ValueError as error:
            log.warn(f"{place} is not a usable index ({error}); its shards are scanned again")
    return {}


def parse_index(data: bytes) -> dict[str, Shard]:
    """The shards that an index file describes, by name; raises ValueError."""
    if not data.startswith(_MAGIC):
        raise ValueError("it starts with other bytes")
    start = len(_MAGIC) + 8
    length = int.from_bytes(data[len(_MAGIC) : start], "little")
    try:
        shards = [Shard(**fields) for fields in json.loads(data[start : start + length])]
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    position = start + length
    for shard in shards:
        shard.rows = data[position : position + shard.count * ROW.size]
        position += shard.count * ROW.size
    if position != len(data):
        raise ValueError(f"it has {len(data)} bytes instead of {position}")
    return {shard.name: shard for shard in shards}


def save_index(path: Path, shards: dict[str, Shard]) -> None:
    """Write an index file; raises OSError."""
    header = json.dumps([{k: v for k, v in asdict(shard).items() if k != "rows"} for shard in shards.values()]).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _MAGIC + len(header).to_bytes(8, "little") + header + b"".join(s.rows for s in shards.values()))


def _save(folder: Path, shards: dict[str, Shard]) -> None:
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
