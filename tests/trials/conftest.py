"""The process that starts commands, and small runs to be ended in many ways."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.trials.starter import Life, Starter
from vlp import checkpoint
from vlp.pretrained.parts import whole_tables
from vlp.pretrained.runs import KINDS

CONFIG = """
out: {out}
data:
  sources: [{{name: shards, path: {data}}}]
  workers: 0
model:
  image_tower: {{name: vit, image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}}
  text_tower: {{name: transformer, context_length: 24, width: 32, layers: 1, heads: 2}}
  embed_dim: 16
train: {{duration: 12, batch: 48, precision: float32, optimizer: {{lr: 1e-3}}}}
objective: {{infonce: {{}}, fastclip: {{version: v2}}}}
log: {{every: 1}}
checkpoint: {{every: 1, keep: 2}}
"""


@pytest.fixture(scope="package")
def starter(tmp_path_factory):
    with Starter(tmp_path_factory.mktemp("consoles")) as running:
        yield running


@dataclass
class Runs:
    """Runs of one configuration, each in a folder of its own."""

    starter: Starter
    folder: Path
    data: Path
    chance: random.Random

    def start(
        self, name: str, *overrides: str, n_ranks: int = 1, ends_at: str | None = None
    ) -> Life:
        config = self.folder / f"{name}.yaml"
        config.write_text(CONFIG.format(out=self.folder / name, data=self.data))
        return self.starter.start("train", config, *overrides, n_ranks=n_ranks, ends_at=ends_at)

    def finish(self, name: str, *overrides: str, n_ranks: int = 1) -> Life:
        life = self.start(name, *overrides, n_ranks=n_ranks)
        assert life.wait() == [0] * n_ranks, life.said()
        return life

    def until(self, life: Life, due: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait for a moment of a life; it may end before."""
        deadline = time.monotonic() + timeout_s
        while life.alive() and not due():
            assert time.monotonic() < deadline, life.said()
            time.sleep(0.002)

    def n_lines(self, name: str) -> int:
        metrics = self.folder / name / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def outcome(self, name: str) -> dict[str, Any]:
        """All that a run came to: the losses in order, and a digest of each kind of tensors."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        losses = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
        last = checkpoint.all_of(self.folder / name)[-1]
        contents = checkpoint.load(last)
        digests = {}
        for kind in KINDS:
            digest = hashlib.sha256()
            tensors = whole_tables(getattr(contents, kind))
            for name, value in sorted(tensors.items()):
                digest.update(name.encode() + value.numpy().tobytes())
            digests[kind] = digest.hexdigest()
        return {"losses": losses, "checkpoint": last.name, "tensors": digests}


@pytest.fixture
def runs(starter, scenes, tmp_path):
    return Runs(starter, tmp_path, scenes / "train", random.Random(3))
