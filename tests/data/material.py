"""Small shards and pictures for the tests of the data room."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlp.config import Data
from vlp.data.format import ShardWriter
from vlp.data.loader import Loader
from vlp.schema import parse
from vlp.types import ImageSpec, TextSpec

REAL = Path(os.environ.get("VLP_DATA") or Path(__file__).parents[3] / "shared" / "data")
needs_data = pytest.mark.skipif(
    not (REAL / "coco_open.tar").exists(),
    reason=f"{REAL} is absent; set VLP_DATA to the folder with the real data",
)

IMAGE = ImageSpec((32, 32))
TEXT = TextSpec("clip", 16)


def picture(i: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A smooth picture that depends on i, (width, height) pixels."""
    y, x = np.mgrid[: size[1], : size[0]]
    channels = [
        (x * (i % 5 + 1) + y * (i % 3) * 2 + i * 37) % 256,
        (y * 3 + i * 11) % 256,
        (x + y + i * 5) % 256,
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8)).resize(
        size, Image.Resampling.BILINEAR
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_shards(folder: Path, n: int, per_shard: int, start: int = 0, **meta: Any) -> Path:
    """n samples; sample i has the picture and two captions that tell i."""
    with ShardWriter(folder, per_shard) as writer:
        for i in range(start, start + n):
            writer.add(
                None,
                encoded(picture(i)),
                "png",
                [f"caption {i} one", f"caption {i} two"],
                {"number": i, **meta},
            )
    return folder


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A plain tar of these members, as another tool would write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def data_of(*sources: dict[str, Any] | Path, **options: Any) -> Data:
    plugins = [{"name": "shards", "path": str(s)} if isinstance(s, Path) else s for s in sources]
    return parse(Data, {"sources": plugins, "workers": 0, **options})


def loader_of(data: Data, batch: int, **options: Any) -> Loader:
    return Loader(data, IMAGE, TEXT, **{"batch": batch, "seed": 3, **options})
