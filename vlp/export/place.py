"""Where an export goes: a folder that appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from vlp.files import save_tensors, sync
from vlp.pretrained import folders


class ExportError(ValueError):
    """A model that cannot be written where or as it was asked to be."""


def check_free(to: Path, overwrite: bool) -> None:
    """Raise ExportError where no folder can appear at `to`."""
    # "." and ".." are places without a name, and cannot be replaced.
    if to.name in ("", ".."):
        raise ExportError(f"{to} has no name of its own; name a new folder, such as exported/model")
    if to.is_file():
        raise ExportError(f"{to} is a file; choose another place")
    if to.is_dir() and any(to.iterdir()) and not overwrite:
        raise ExportError(
            f"{to} is a folder that is not empty; choose another place or add --overwrite"
        )


@contextmanager
def appearing(to: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `to` that takes its name once everything in it is on the disk.

    It ends with the list of its files (MANIFEST). Of a folder that it replaces, files that no
    export wrote are carried over.
    """
    check_free(to, overwrite)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.parent / f".{to.name}.partial-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary

        # The list is written last, over all that there is; then everything goes to the disk, so
        # that the name never stands for half an export.
        files = sorted([*folders.files_of(temporary), folders.MANIFEST])
        write_json(temporary / folders.MANIFEST, {"name": to.name, "files": files})
        _carry_over(to, temporary)
        for path in [*temporary.rglob("*"), temporary]:
            if not path.is_symlink():
                sync(path)

        # Two renames: a crash between them leaves the old folder under its other name.
        replaced = to.parent / f".{to.name}.replaced-{os.getpid()}"
        if to.exists():
            os.replace(to, replaced)
        os.replace(temporary, to)
        sync(to.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Copy what no export wrote from the folder `old` into `new`; ExportError where this export has
    a file of that name.
    """
    if not old.is_dir():
        return
    foreign = sorted(set(folders.files_of(old)) - set(folders.exported_files(old)))
    taken = [name for name in foreign if (new / name).exists()]
    if taken:
        raise ExportError(
            f"{old} holds {', '.join(taken[:3])}, which no export wrote and this one would "
            "replace; move it away"
        )

    for name in foreign:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(old / name, new / name, follow_symlinks=False)


def write_json(path: Path, value: Any) -> None:
    """A JSON file as every export writes it: indented, with a last line end."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file as every library of PyTorch reads it."""
    contiguous = {key: value.contiguous() for key, value in weights.items()}
    save_tensors(contiguous, path, {"format": "pt"})
