"""Every random number is derived from (seed, purpose, position): resuming, replaying and
re-sharding need no saved state.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, purpose: str, *position: int | str) -> int:
    """A 63-bit seed that depends on all arguments, the same on every machine and in every process.

    Python's own `hash` differs from process to process, and torch takes no negative seed.
    """
    text = ":".join(map(str, (seed, purpose, *position)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
