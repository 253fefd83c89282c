"""Small shards with hand-written captions, for the tools that go from shards to shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_tools.in_stores import material as material
from tests.data_tools.in_stores import server as server
from tests.data_tools.language import write_models
from tests.data_tools.mining import store, twins, write
from tests.data_tools.tools import CAPTIONS
from vlp.data.format import ShardWriter


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of two samples; the picture's bytes tell them apart."""
    with ShardWriter(tmp_path / "in", 2) as writer:
        for i, captions in enumerate(CAPTIONS):
            writer.add(
                f"k{i}", f"image {i}".encode(), "jpg", captions, {"class": "x", "extra": [i]}, cls=i
            )
    return tmp_path / "in"


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny language models, by kind."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, Path]:
    """Shards in which samples 2i and 2i + 1 are twins, and their embeddings."""
    return write(tmp_path / "in"), store(tmp_path / "e", *twins())
