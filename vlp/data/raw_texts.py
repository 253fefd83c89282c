"""Captions as they are written, in the rows of a tensor: what a judge reads travels with a batch,
between ranks and into a checkpoint like everything else.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# U, bytes of UTF-8: what is longer is cut. No judge reads further than some hundred tokens.
CAPTION_BYTES = 1024


def to_bytes(texts: list[str]) -> Tensor:
    """uint8 [n, U], zeros after the end of each text."""
    rows = np.zeros((len(texts), CAPTION_BYTES), np.uint8)
    for row, text in zip(rows, texts):
        encoded = text.encode("utf-8", "replace")[:CAPTION_BYTES]
        row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return torch.from_numpy(rows)


def from_bytes(rows: Tensor) -> list[str]:
    """The texts of uint8 [n, U]. Waits for the device that holds them."""
    texts = (row.tobytes().rstrip(b"\0") for row in rows.cpu().numpy())
    # A character that the cut divides is left out.
    return [text.decode("utf-8", "ignore") for text in texts]
