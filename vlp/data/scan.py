"""Reading a tar once, from its first header to its last: the samples that it holds, and what is
left out of them.

Consecutive members of one key are a sample (`vlp.data.runs`). Where a key returns later, or a
dotted key such as x.seg may belong to x, the tar is read again and gathered by key
(`vlp.data.arrange`): all pictures first and then all texts is as good an order as any other.

What is left out is in `Shard.problems` and `Shard.left_out`, never silent: samples without a usable
image, further samples of a key, what lies next to damage, because it might be half a sample, and
every member that no reader looks at. A shard that was written with digests (`vlp.data.digests`)
gives exactly the samples that were written: what is whole beside damage is kept, and any other
bytes are left out, as samples that are missing are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from vlp.data import digests, tar, wrong_captions
from vlp.data.arrange import Scattered, gathered, in_order, read_member
from vlp.data.captions import MAX_TEXT_BYTES, Form, cut, form_of
from vlp.data.members import MAX_IMAGE_BYTES, TEXT_TYPES, Content, check_images, fill, is_picture
from vlp.data.paths import unreadable
from vlp.data.rows import (
    CLASS,
    CONTINUES,
    EXTENT,
    LABELS,
    PICTURED,
    READER,
    ROW,
    SCATTERED,
    Shard,
    labels_of,
)
from vlp.data.runs import Members, runs_of
from vlp.data.summary import summarize
from vlp.data.tar import BLOCK

# The statistics of a shard name what it was written with; deleting them accepts what it holds now.
_ALTERED = (
    "altered since it was written: its members or their bytes are others; restore the shard, or "
    "delete its _stats.json where the tar was changed on purpose"
)
_UNWRITTEN = (
    "not written with this shard: where the tar was changed on purpose, delete its _stats.json"
)


@dataclass(frozen=True)
class Found:
    """A usable sample of a tar: where its members lie, and what its texts say."""

    content: Content  # without the images' bytes
    members: Members  # the image is among them
    texts: bytes  # of its text members, one after another
    digest: int
    digest_written: int  # by the names that our writer gives: without the ./ of `tar -C DIR -c .`
    # Its members follow one another, with none of another sample between: one reading gives it.
    whole: bool


def scan(path: Path) -> Shard:
    """Index one tar; damage costs only the samples beside it. Raises ValueError for what is no tar
    to read from.
    """
    rows: list[_Rows] = []

    def begin(shard: Shard) -> Callable[[Found], None]:
        rows[:] = [_Rows(shard)]
        return rows[0].add

    shard = read(path, begin)
    rows[0].finish()
    return shard


def read(
    path: Path,
    begin: Callable[[Shard], Callable[[Found], None]],
    also: frozenset[str] = frozenset(),
) -> Shard:
    """Give every usable sample of a tar to the function that `begin` returns; the shard tells what
    is left out.

    `begin` is called again, and what it got before is void, where members turn out to be out of
    order. `also`: the extensions of further members to find, which are their kinds. Raises
    ValueError for what is no tar to read from.
    """
    try:
        with open(path, "rb", buffering=1 << 18) as file:
            status = os.fstat(file.fileno())
            times = status.st_mtime_ns, status.st_ctime_ns
            shard = Shard(path.name, status.st_size, *times, reader=READER)
            _refuse_packed(path, file)

            # Nearly every tar is in order; only of the others all members are held in memory.
            try:
                _read(path, file, shard, begin(shard), also, in_order)
            except Scattered:
                shard = replace(
                    shard, left_out={}, problems=[], n_left_out=0, n_problems=0, n_damaged=0
                )
                _read(path, file, shard, begin(shard), also, gathered)
    except IsADirectoryError:
        raise ValueError(
            f"{path} is a folder, not a tar; rename it, or make a tar of what it holds"
        ) from None
    except OSError as error:
        raise ValueError(unreadable(path, error)) from None
    return shard


def _refuse_packed(path: Path, file: BinaryIO) -> None:
    if name := tar.packed_with(file.read(BLOCK)):
        raise ValueError(
            f"{path} is compressed with {name}, but samples are read from any place of a plain "
            f"tar; unpack it, or write plain shards: vlp data reshard {path} --to DIR"
        )


def _read(
    path: Path,
    file: BinaryIO,
    shard: Shard,
    take: Callable[[Found], None],
    also: frozenset[str],
    arrange: Callable[..., Iterator[Any]],
) -> None:
    """Give `take` the samples that `arrange` makes of the members; the shard learns of others."""
    written = _written(path, shard)
    missing = dict.fromkeys(written or {})
    samples = arrange(runs_of(file, shard, also), file, shard, judged=written is not None)

    for key, members, whole in samples:
        missing.pop(key, None)
        found = _found(file, shard, key, members, whole)
        if found is None:
            continue

        # The digest decides, also over what damage and repeated keys made of the members.
        if written is not None and found.digest_written != written.get(key):
            shard.report(key, _ALTERED if key in written else _UNWRITTEN)
            shard.n_left_out += 1
            continue
        take(found)

    for key in missing:
        shard.report(key, f"lost: the shard was written with it ({digests.stats_of(path).name})")
        shard.n_left_out += 1


def _written(path: Path, shard: Shard) -> dict[str, int] | None:
    """The digests that a tar's samples were written with; None where none can be read."""
    try:
        return digests.beside(path)
    except ValueError as error:
        shard.report("", f"samples are not compared with what was written: {error}")
        return None


def _found(file: BinaryIO, shard: Shard, key: str, members: Members, whole: bool) -> Found | None:
    """The sample with its texts read; None, and a problem, where it cannot be used."""
    content = Content(key)
    try:
        check_images(members)
        data = {
            kind: read_member(file, member)
            for kind, member in members.items()
            if is_picture(kind) or kind in TEXT_TYPES
        }
        # One byte more than the limit, so that reading them notes their size.
        texts = {kind: data[kind][: MAX_TEXT_BYTES + 1] for kind in members if kind in TEXT_TYPES}
        fill(content, texts)
    except ValueError as error:
        shard.report(key, str(error))
        shard.n_left_out += 1
        return None

    # Oddities that cost only themselves.
    for note in content.notes:
        shard.report(key, note)
    for kind in content.spare:
        shard.pass_over(kind)
    by_name = {members[kind].name: data[kind] for kind in data}
    digest = digest_written = digests.digest_of(by_name)
    if any(name.startswith("./") for name in by_name):
        bare = {name.removeprefix("./"): member for name, member in by_name.items()}
        digest_written = digests.digest_of(bare)
    return Found(content, members, b"".join(texts.values()), digest, digest_written, whole)


class _Rows:
    """The rows of a shard, as its samples are found."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.rows, self.extents = bytearray(), bytearray()
        self.forms: dict[tuple, int] = {}  # each with its number
        self.numbers: dict[tuple, int] = {}  # of the forms before they are cut
        self.keys, self.texts, self.content = (hashlib.sha256() for _ in range(3))
        self.origin: Any = None  # of the last row; None: it has none

    def add(self, found: Found) -> None:
        """One more sample."""
        content = found.content
        places = _places(found)
        length = sum(size for _, size in places)
        if length > 2 * MAX_IMAGE_BYTES:
            self.shard.report(content.key, f"members spread over too many bytes: {length}")
            self.shard.n_left_out += 1
            return

        flags = self._flags(found)
        # A row names a form by its number: a text for each sample would be most of an index.
        form = self._number(form_of(content.meta, content.text))
        for problem in wrong_captions.problems(content.meta, content.captions):
            self.shard.report(content.key, problem)
        counts = []
        for name in wrong_captions.LISTS:
            texts = wrong_captions.read(content.meta, name, content.captions)
            counts.append(min(texts.most(content.captions), 255))

        # One reading where the members follow one another, else a table of places.
        start = places[0][0]
        if len(places) > 1:
            flags |= SCATTERED
            start = len(self.extents) // EXTENT.size
            self.extents += b"".join(EXTENT.pack(*place) for place in places)

        key = content.key.encode()
        self.keys.update(b"\n" + key if self.rows else key)
        self.texts.update(found.texts)
        self.content.update(found.digest.to_bytes(4, "little"))
        self.rows += ROW.pack(start, length, form, found.digest, *counts, flags)

    def _flags(self, found: Found) -> int:
        """What the sample has, and whether its origin is that of the sample before."""
        meta, origin_before = found.content.meta, self.origin
        self.origin = meta.get("origin")

        flags = CLASS if isinstance(meta.get("class"), str) else 0
        if any(kind != "image" and is_picture(kind) for kind in found.members):
            flags |= PICTURED

        if self.origin is not None and self.origin == origin_before:
            flags |= CONTINUES

        for name in labels_of(meta):
            flags |= LABELS[name]
        return flags

    def _number(self, form: Form) -> int:
        """The number of a form, which is cut only once: most samples of a shard have the same."""
        whole = tuple(form.items())
        if whole not in self.numbers:
            kept = tuple(cut(form).items())
            self.numbers[whole] = self.forms.setdefault(kept, len(self.forms))
        return self.numbers[whole]

    def finish(self) -> None:
        """Give the shard what was gathered."""
        shard = self.shard
        shard.rows, shard.extents = bytes(self.rows), bytes(self.extents)
        shard.count = len(shard.rows) // ROW.size
        shard.forms = [dict(form) for form in self.forms]
        shard.keys, shard.texts = self.keys.hexdigest(), self.texts.hexdigest()
        shard.content = self.content.hexdigest()
        summarize(shard)


def _places(found: Found) -> list[tuple[int, int]]:
    """(offset, bytes) of a sample's members: one place where they follow one another, with all that
    lies between them.
    """
    members = list(found.members.values())
    if found.whole:
        return [(members[0].start, members[-1].end - members[0].start)]

    places: list[tuple[int, int]] = []
    for member in sorted(members, key=lambda member: member.start):
        start = member.start
        # Members that touch are one reading.
        if places and sum(places[-1]) == start:
            start, _ = places.pop()
        places.append((start, member.end - start))
    return places
