"""Files that appear whole or not at all, with the rights that the user's umask gives. Imports the
standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

if TYPE_CHECKING:
    from torch import Tensor

_SYSTEM = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust tell an error of the system


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader or a crash sees the old file or the new one, never a
    part.
    """
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name of its own beside `path` for the block to write a file under, which then gets its
    name: whole, or not at all.
    """
    temporary = _temporary_name(path)
    try:
        with naming(path):
            yield temporary

        # Only now: a name that pointed to content not yet on the disk could survive a crash.
        sync(temporary)
        # The path's own way: one in a store is in the store then, too.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer has."""
    # Processes of several machines write into one folder, and may have one number.
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file until all is written or an error says why not."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left unfinished in `folder`. For whoever knows that nobody writes
    there now.
    """
    # The names under which this module writes.
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a .safetensors file, tensor by tensor; raises OSError.

    safetensors writes files that only their owner may read, and tells a full disk as an error of
    its own.
    """
    from safetensors.torch import save_file

    with naming(path):
        save_file(dict(tensors), path, metadata=metadata)

    # Python can tell the umask only by changing it; a new file shows what it allows.
    probe = _temporary_name(path)
    try:
        probe.touch()
        shutil.copymode(probe, path)
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system that come out of the block be OSErrors that name `path`.

    A full disk's name no file; and libraries in Rust (safetensors, tokenizers) tell them as errors
    of their own.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        number = _SYSTEM.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, have reached the disk."""
    # Without it a rename can reach the disk before the content.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(path: Path) -> None:
    """Raise OSError where nothing could be written at `path`; leaves nothing behind."""
    folder = existing(path)
    if folder.is_file():
        if path.absolute() != folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        folder = folder.parent

    # os.access knows neither full quotas nor file systems mounted for reading.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:  # its file name is the temporary one
        raise type(error)(error.errno, error.strerror, str(folder)) from None
