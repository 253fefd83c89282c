"""Tensors as the content of a file, the same bytes for the same tensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = 8  # bytes that hold the header's length
_METADATA = "__metadata__"


def as_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The content of a .safetensors file, with its metadata by name.

    safetensors writes them in an order that differs from process to process, so that a shard which
    was done twice would have two files.
    """
    from safetensors.torch import save

    data = save(tensors, metadata)
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    header = json.loads(data[_LENGTH:end])
    header[_METADATA] = dict(sorted(header[_METADATA].items()))

    # Padded as the library does, so that tensors begin where a mapped file can be read.
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text + data[end:]
