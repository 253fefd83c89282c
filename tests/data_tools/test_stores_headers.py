"""Embeddings and further modalities in a store: their headers are read without the rest."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.data.loopback_store import Store
from vlp.data.embedded import Embeddings
from vlp.data.index import located
from vlp.data.modalities import Rows
from vlp.data.paths import expand
from vlp.data.stored import source
from vlp.data.tensor_file import header

WIDTH = 40_000  # 160 kB a shard of two samples, for each side


def write_wide(root: Path) -> None:
    """Beside the three shards of the store, what belongs to them."""
    for number, shard in enumerate(located(expand(str(root / "in")))):
        rows = np.full((shard.count, WIDTH), number, np.float16)
        about = {"model": "wide", "scale": "1.0", "keys": shard.keys}
        for folder in ("embedded", "sound"):
            (root / folder).mkdir(exist_ok=True)
        name = f"{number:05d}.safetensors"
        save_file({"image": rows, "text": -rows}, root / "embedded" / name, about)
        lengths = np.ones(shard.count, np.int32)
        save_file({"rows": rows[:, None], "length": lengths}, root / "sound" / name, about)


def sent(server: Store, folder: str) -> int:
    """The bytes of a folder's files that the store has sent."""
    return sum(n for name, n in server.n_sent.items() if name.startswith(folder))


def test_a_header_comes_without_the_rows(server: Store) -> None:
    write_wide(server.root)
    paths = expand("s3://bucket/in")
    shards = located(paths)
    server.ending, server.faults = ".safetensors", ["error", "drop"]
    stored = Embeddings("s3://bucket/embedded", [*map(str, paths)], shards, with_text=False)
    sound = Rows("s3://bucket/sound", [*map(str, paths)], shards)
    assert server.suffered["error"] == server.suffered["drop"] == 1
    assert stored.teacher.width == WIDTH and sound.shape == (1, WIDTH)
    whole = sum(path.stat().st_size for path in server.root.glob("*/*.safetensors"))
    n_sent = sent(server, "embedded") + sent(server, "sound")
    assert 0 < n_sent < 12 * (1 << 14) < whole / 4

    # The rows come with the first one that is wanted: those of its file alone.
    assert (stored.mapped(1, "text") == -1).all()
    one_file = (server.root / "embedded" / "00001.safetensors").stat().st_size
    assert one_file <= sent(server, "embedded") < one_file + 7 * (1 << 14)
    # What is here is not asked for again.
    n_sent = sent(server, "embedded")
    assert header(stored.file(1)).shapes["image"] == (2, WIDTH)
    assert sent(server, "embedded") == n_sent


def test_headers_longer_than_a_first_read_and_damage(server: Store, tmp_path: Path) -> None:
    path = server.root / "in" / "many.safetensors"
    tensors = {f"tensor{i:05d}": np.full(2, i, np.float16) for i in range(1000)}
    save_file(tensors, path, {"model": "x" * 5000})
    for place in ("s3://bucket/in/many.safetensors", str(path)):
        about = header(source(place))
        assert about.metadata == {"model": "x" * 5000} and len(about.shapes) == 1000
        start, end = about.places["tensor00321"]
        assert np.frombuffer(path.read_bytes()[start:end], np.float16).tolist() == [321, 321]

    whole = path.read_bytes()
    n_damaged = 0
    for content, message in (
        (whole[:-1], "it is cut short"),
        (whole[:4000], "do not begin with the header"),
        (b"", "do not begin with the header"),
        (b"\xff" * 100, "do not begin with the header"),
        ((8).to_bytes(8, "little") + b"[1, 2]  ", "no list of tensors"),
    ):
        name = hashlib.sha256(content).hexdigest()[:8]
        damaged = tmp_path / f"{name}.safetensors"
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            header(damaged)
        n_damaged += 1
    assert n_damaged == 5
