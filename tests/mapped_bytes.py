"""How much of a checkpoint in parts is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from torch import Tensor

from vlp.pretrained.parts import Joined


def n_bytes_read(reads: Callable[[], Any]) -> int:
    """Bytes of parts that a call maps from their files."""
    part, sizes = Joined.part, []

    def counted(*args: Any) -> Tensor:
        values = part(*args)
        sizes.append(values.nbytes)
        return values

    with patch.object(Joined, "part", counted):
        reads()
    return sum(sizes)
