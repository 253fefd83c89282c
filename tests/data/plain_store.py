"""A store in a folder of this machine, which shows a file while it is written, and can rename."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from fsspec.implementations.local import LocalFileSystem


class Plain(LocalFileSystem):
    """A store that shows a file while it is written, and can rename."""

    protocol = "plain"
    root = ""
    renamed: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.replace(f"{cls.protocol}://", f"{cls.root}/").rstrip("/")

    def mv(self, path1: str, path2: str, **_: object) -> None:
        self.renamed.append(path1)
        Path(path1).rename(path2)
