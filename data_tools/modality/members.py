"""The members of a shard that belong to its samples and that the index passes over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vlp.data.further_members import Member, of_tar


def of_keys(path: Path, keys: Sequence[str], counts: Counter[str]) -> dict[str, list[Member]]:
    """The members of samples by key, in order of their names; counts a damaged tar."""
    found = of_tar(path)
    if found.damage:
        counts[f"unreadable: members after damage ({found.damage})"] += 1
    return {key: found.members[key] for key in keys if key in found.members}
