"""Material that several rooms' tests share."""

import os
import sys
from pathlib import Path

import pytest

from tests import skips

# pytest takes hooks by their names.
pytest_make_collect_report = skips.pytest_make_collect_report
pytest_runtest_makereport = skips.pytest_runtest_makereport

# DeepSpeed looks for ninja, and tests start vlp and accelerate, which live beside this interpreter.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small set of generated scenes: train/, zeroshot/, retrieval/, …"""
    from vlp.data_tools.scenes import write

    folder = tmp_path_factory.mktemp("scenes")
    write(
        folder,
        n_train=200,
        n_val=8,
        n_test=8,
        n_zeroshot=56,
        n_retrieval=20,
        n_proofs=9,
        size=32,
        processes=1,
    )
    return folder


SETTINGS = """
out: {out}
data:
  sources: [{{name: shards, path: {data}}}]
  workers: 1
model:
  image_tower:
    {{name: vit, image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16,
      patch_dropout: 0.25}}
  text_tower: {{name: transformer, context_length: 24, width: 32, layers: 1, heads: 2}}
  embed_dim: 16
train: {{duration: 9, batch: 48, micro_batches: 2, precision: float32, optimizer: {{lr: 1e-3}}}}
objective: {{infonce: {{}}, fastclip: {{version: v2}}}}
log: {{every: 1}}
checkpoint: {{every: 3, keep: 2}}
"""


@pytest.fixture
def settings(scenes, tmp_path):
    """Nine steps of 48 of 200 scenes: steps_per_epoch is 4, so checkpoints lie in mid-epoch."""

    from vlp import config

    def make(*overrides, out="run"):
        path = tmp_path / f"{out}.yaml"
        path.write_text(SETTINGS.format(out=tmp_path / out, data=scenes / "train"))
        return config.load(path, list(overrides))

    return make


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """Shards, their pictures as files, a configuration and a run of it."""
    import tarfile

    from tests.data.material import write_shards
    from tests.test_messages import CONFIG
    from vlp.cli import main

    folder = tmp_path_factory.mktemp("world")
    shards = write_shards(folder / "shards", 24, 12)
    pictures = folder / "pictures"
    pictures.mkdir()
    for shard in shards.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(pictures, filter="data")
    config = folder / "good.yaml"
    config.write_text(CONFIG.format(out=folder / "run", shards=shards))
    assert main(["train", str(config)]) == 0
    return {
        "folder": folder,
        "shards": shards,
        "config": config,
        "run": folder / "run",
        "pictures": pictures,
    }
