"""Compressed tars, unpacked beside the output of a tool that needs them plain, for as long as it
works.
"""

from __future__ import annotations

import lzma
import shutil
import zlib
from pathlib import Path

from vlp.data.stored import StoredPath
from vlp.data.tar import open_packed, packed_with
from vlp.files import replacing

FOLDER = "_unpacked"


class Unpacked:
    """The plain tars of a tool's input: itself, or a copy in a folder of the tool's output."""

    def __init__(self, output: Path) -> None:
        # Of a store they lie in the scratch folder: a store would be sent each byte.
        self.folder = (output.local() if isinstance(output, StoredPath) else output) / FOLDER
        self.n = 0

    def plain(self, path: Path) -> Path:
        """The tar to read; raises ValueError for a stream that is damaged. A copy that a killed
        call left is taken up.
        """

        # By content, not by name: a .tar may be compressed as well.
        with open(path, "rb") as file:
            if not packed_with(file.read(8)):
                return path

        # The size tells a copy of this shard from one that another call left under its number.
        copy = self.folder / f"{self.n:05d}_{path.stat().st_size}.tar"
        self.n += 1
        if not copy.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _unpack(path, copy)
        return copy

    def remove(self) -> None:
        """Take the copies away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _unpack(path: Path, copy: Path) -> None:
    try:
        with (
            replacing(copy) as temporary,
            open_packed(path) as stream,
            open(temporary, "wb") as file,
        ):
            shutil.copyfileobj(stream, file, 1 << 20)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        # An errno is of the disk, not of the stream: the advice would be wrong.
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(
            f"{path} cannot be unpacked to its end ({error}); fetch it again"
        ) from None
