"""The folder that a pack becomes: written beside it, and renamed when it is whole."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes `target`, in place of an earlier one, when the block ends
    without an error.
    """
    from vlp.files import sync

    # Named by process, so that two calls do not write into one folder. What killed calls left
    # behind is removed.
    prefix = f".{target.name}.{socket.gethostname()}."
    for leftover in target.parent.glob(f"{prefix}*.partial"):
        if not _is_alive(leftover.name.removeprefix(prefix).removesuffix(".partial")):
            shutil.rmtree(leftover, ignore_errors=True)

    partial = target.with_name(f"{prefix}{os.getpid()}.partial")
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        previous.rename(target)  # a call was killed between its two renames
    try:
        yield partial
        sync(partial)
        check_target(target, overwrite)  # again: another call may have finished meanwhile

        # The earlier pack moves aside first, so that a kill between the renames loses neither.
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            target.rename(previous)
        partial.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        if previous.exists() and not target.exists():
            previous.rename(target)
        shutil.rmtree(partial, ignore_errors=True)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; --to names a new folder")

    files = [path for path in target.rglob("*") if not path.is_dir()]
    if files and not overwrite:
        raise FileExistsError(
            f"{target} is not empty; choose another folder, or --overwrite to replace it"
        )

    # --overwrite deletes the folder, so it must look like one that a pack wrote.
    suffixes = {".tar", ".txt", ".json", ".bin"}
    is_pack = any(target.rglob("*_stats.json"))
    foreign = [path for path in files if not is_pack or path.suffix not in suffixes]
    if foreign:
        raise FileExistsError(
            f"{target} holds files that no pack wrote, such as {foreign[0].name}; "
            "choose another folder"
        )
