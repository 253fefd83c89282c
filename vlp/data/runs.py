"""From the headers of a tar to runs: consecutive members of one key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from vlp.data import tar
from vlp.data.members import Name, is_guest, parse_name
from vlp.data.rows import Shard
from vlp.data.tar import BLOCK, DamagedTar, Member

Members = dict[str, Member]  # of one sample, by kind


@dataclass
class Run:
    """Consecutive members of one key, and of keys that may be its guests."""

    key: str
    suspect: bool  # it lies next to damage
    parts: dict[str, Members] = field(default_factory=dict)  # by key
    names: set[str] = field(default_factory=set)

    def continues_with(self, member: Member, name: Name) -> bool:
        """Whether a member, of a name not yet in the run, belongs to its key or to a guest."""
        belongs = name.key == self.key or is_guest(name.key, self.key)
        return belongs and member.name not in self.names

    def add(self, member: Member, name: Name, passed: Counter[str]) -> None:
        """Take a member in; one of a kind that is there already is passed over."""
        members = self.parts.setdefault(name.key, {})
        self.names.add(member.name)

        if name.kind in members:
            kind = "further members of a kind that the sample has already"
            passed[f"{kind}: .{name.extension}"] += 1
        else:
            members[name.kind] = member


def runs_of(file: BinaryIO, shard: Shard, also: frozenset[str]) -> Iterator[Run]:
    """The members that count, in runs of one key, in order; the shard learns of damage and of all
    other members.
    """
    file.seek(0)
    kind = "an empty file" if not shard.size else tar.foreign(file.read(BLOCK))
    if kind:
        shard.n_damaged += 1
        shard.report("", f"no tar: it is {kind}")
        return

    run: Run | None = None
    passed: Counter[str] = Counter()
    position, suspect = 0, False
    while position < shard.size:
        try:
            for member in tar.walk(file, position, shard.size, passed):
                name = _counting(member, also, passed)
                if name is None:
                    continue

                if run is None or not run.continues_with(member, name):
                    if run is not None:
                        yield run
                    run, suspect = Run(name.key, suspect), False
                run.add(member, name, passed)
            break  # the end of the file
        except DamagedTar as error:
            # What lies before the damage may be half a sample, and so may what comes after it.
            shard.n_damaged += 1
            shard.report("", f"damage: {error}")
            if run is not None:
                run.suspect = True
                yield run
            run, suspect = None, True

            # A pair is never made across a gap: reading goes on at the next valid header.
            next_block = error.offset + 1 + (-error.offset - 1) % BLOCK
            position = tar.find_header(file, next_block, shard.size)

    if run is not None:
        if not _ends(file, shard.size):
            shard.n_damaged += 1
            shard.report(
                "",
                "damage: the file ends without the mark of a tar's end, "
                "so its last sample may be half",
            )
            run.suspect = True
        yield run
    _report_passed(shard, passed)


def _report_passed(shard: Shard, passed: Counter[str]) -> None:
    """Tell the shard what no reader looks at, and of tars joined in one."""
    if joints := passed.pop("joints", 0):
        shard.report(
            "",
            "several tars joined in one: tar and webdataset stop before the further "
            f"{joints}, which are read here",
        )

    for kind, n in passed.items():
        shard.pass_over(kind, n)


def _counting(member: Member, also: frozenset[str], passed: Counter[str]) -> Name | None:
    """The name of a member that counts; of any other, `passed` learns what it is."""
    name = parse_name(member.name)
    if name is None:
        if not member.name.endswith("/"):
            passed["hidden files"] += 1
        return None

    if name.kind:
        return name
    if name.extension in also:
        return name._replace(kind=name.extension)

    # A long one is damage or an attack, and counts would hold it.
    extension = name.extension[:12]
    passed[f"members .{extension}" if extension else "members without an extension"] += 1
    return None


def _ends(file: BinaryIO, size: int) -> bool:
    """Whether the file ends in the zeros that close a tar; one that was cut between two members
    does not.
    """
    file.seek(max(0, size - BLOCK))
    return file.read() == bytes(BLOCK)
