"""Folders and tars of pictures, and what `pack` makes of them."""

from __future__ import annotations

from pathlib import Path

from tests.data.material import encoded, picture, write_tar
from vlp.cli import main
from vlp.config import Captions
from vlp.data.sources.shards import Options
from vlp.data.sources.shards import open as open_shards

TEMPLATES = {"class_templates": ["a {}."]}


def put(root: Path, *names: str, data: bytes | None = None) -> Path:
    """Files below `root`: pictures where no data are given."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture(i)) if data is None else data)
    return root


def pack(*arguments: str | Path) -> int:
    return main(["data", "pack", *map(str, arguments)])


def packed(folder: Path, **captions) -> list:
    source = open_shards(Options(str(folder)), Captions(**captions))
    return [source[i] for i in range(len(source))]


def both(tmp_path: Path, root: Path) -> list[Path]:
    """The folder, and a tar of the same files."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    members = [(f"./{path.relative_to(root).as_posix()}", path.read_bytes()) for path in files]
    return [root, write_tar(tmp_path / "as.tar", members)]
