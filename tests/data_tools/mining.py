"""Planted neighbours: shards, and embeddings of them as `vlp data embed` writes them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.data.material import encoded, picture
from vlp.data.format import ShardWriter

N, D = 24, 16
A_SHARD = 8


def write(folder: Path, captions: dict[int, list[str]] | None = None, **metas: dict) -> Path:
    """N samples in three shards; the pictures open."""
    with ShardWriter(folder, A_SHARD) as writer:
        for i in range(N):
            texts = (captions or {}).get(i, [f"caption {i}", f"also {i}"])
            meta = metas.get(f"k{i}", {"extra": i})
            writer.add(f"k{i}", encoded(picture(i, (12, 12))), "png", texts, meta)
    return folder


def store(folder: Path, image: np.ndarray, text: np.ndarray, **about: str) -> Path:
    """Embeddings as `vlp data embed` writes them."""
    folder.mkdir(exist_ok=True)
    for shard in range(N // A_SHARD):
        part = slice(shard * A_SHARD, (shard + 1) * A_SHARD)
        keys = "\n".join(f"k{i}" for i in range(part.start, part.stop))
        metadata = {"model": "not here", "scale": "10", "weights": "w"} | about
        metadata["keys"] = hashlib.sha256(keys.encode()).hexdigest()
        rows = {"image": image[part].astype(np.float16), "text": text[part].astype(np.float16)}
        save_file(rows, folder / f"{shard:05d}.safetensors", metadata)
    return folder


def rows(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(N, D))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def twins(near: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    """Samples 2i and 2i + 1 are twins: each one's text lies beside the other's picture."""
    text = np.eye(N, 2 * N)
    image = np.eye(N, 2 * N)
    for i in range(N):
        image[i, i ^ 1] = near  # beside 1 for its own
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    return image, text


def counted(out: str, name: str) -> int:
    """A number of a tool's report."""
    match = re.search(rf"^  {re.escape(name)} +([\d,]+)$", out, re.M)
    return int(match[1].replace(",", "")) if match else 0
