"""A digest of every sample: what a shard was written with, beside the shard, and checked when it is
read.

`NNNNN_stats.json` of a shard that `vlp.data.format.ShardWriter` wrote holds

    "digests": {"crc32": {"000000000": "9ae0daaf", …}}       a key's digest, in hex

Reading a tar for its index compares every sample with it (`vlp.data.scan`); the index keeps the
digests, and reading a sample compares with them (`vlp.data.members.open_sample`). A tar without
them, of another tool, gets the digests of what it held when it was indexed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

UNKNOWN = 0  # in place of a digest: the sample is not checked
_METHOD = "crc32"


def digest_of(members: Mapping[str, bytes]) -> int:
    """CRC-32 over the names and bytes of a sample's members, in order of their names; never
    UNKNOWN.

    It guards against damage and mix-ups, not against attackers: of 2^32 other samples one has the
    same digest. zlib's crc32 reads 3 to 7 GB/s here, the cryptographic hashes of the standard
    library .4 to 2, which would cost a tenth of the time of decoding a photo.
    """
    digest = 0
    for name, data in sorted(members.items()):
        # The length keeps the end of one member apart from the name of the next.
        beginning = b"%b\0%d\0" % (name.encode(), len(data))
        digest = zlib.crc32(data, zlib.crc32(beginning, digest))
    return digest or 1


def as_json(digests: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """The digests of a shard's samples, by key, as its statistics hold them."""
    return {_METHOD: {key: f"{digest:08x}" for key, digest in digests.items()}}


def beside(path: Path) -> dict[str, int] | None:
    """The digests by key that the samples of a tar were written with; None where none are kept.

    Raises ValueError for statistics that are damaged.
    """
    stats = stats_of(path)
    try:
        content = json.loads(stats.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{stats.name} cannot be read ({type(error).__name__})") from None

    # img2dataset's statistics, and those of older versions of this project, hold none.
    digests = content.get("digests") if isinstance(content, dict) else None
    if not isinstance(digests, dict) or _METHOD not in digests:
        return None

    try:
        return {key: int(digest, 16) for key, digest in digests[_METHOD].items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{stats.name} holds no digests ({type(error).__name__})") from None


def stats_of(path: Path) -> Path:
    """Where the statistics of a tar lie."""
    return path.with_name(f"{path.stem}_stats.json")
