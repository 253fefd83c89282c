"""Lists of samples to keep: DataComp's .npy of uid halves, or a .txt of uids and keys."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from vlp.data.stored import source

if TYPE_CHECKING:
    import numpy as np

    from vlp.data.members import Content


def is_listed(path: str, sample: Content) -> bool:
    """Whether a list holds the sample: by `uid` in its JSON (32 hexadecimal digits, as DataComp has
    it), in a .txt also by key.
    """
    import numpy as np

    uid = sample.meta.get("uid")
    if path.endswith(".txt"):
        return not _lines(path).isdisjoint((uid, sample.key))
    if not (isinstance(uid, str) and re.fullmatch("[0-9a-fA-F]{32}", uid)):
        return False

    # The list is sorted by its upper halves only, so the lower ones are looked for among equals.
    pairs = _pairs(path)
    high, low = np.uint64(int(uid[:16], 16)), np.uint64(int(uid[16:], 16))
    first = pairs["f0"].searchsorted(high, "left")
    last = pairs["f0"].searchsorted(high, "right")
    return low in pairs["f1"][first:last]


@cache
def _lines(path: str) -> frozenset[str]:
    return frozenset(source(path).read_text(encoding="utf-8").split())


@cache
def _pairs(path: str) -> np.ndarray:
    """The halves of the uids, sorted; a sorted file, such as DataComp's, is mapped into memory
    rather than read.
    """
    import numpy as np

    # A list may be larger than memory.
    pairs = np.load(source(path), mmap_mode="r")
    if pairs.dtype != np.dtype("u8,u8") or pairs.ndim != 1:
        raise ValueError(
            f"{path} holds {pairs.dtype} {pairs.shape}; "
            "expected DataComp's pairs of 64-bit halves, dtype u8,u8"
        )

    high = pairs["f0"]
    is_sorted = (high[1:] >= high[:-1]).all()
    return pairs if is_sorted else np.sort(pairs)
