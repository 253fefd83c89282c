"""Error reports of the commands: one message with what was found, what was expected and what to
do.

Rooms refuse bad input in their own words. Here stands what comes from elsewhere: the operating
system, libraries, other processes. An error that nobody here knows is a bug, and keeps its
traceback.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from vlp.files import existing
from vlp.privacy import scrubbed

SWITCH = "VLP_TRACEBACK"  # in the environment: show the traceback of every error

_NO_ONNX = (
    "the ONNX form could not be made; "
    "leave out --onnx, or try the versions of pip install 'vlp[hub]'"
)
# Libraries that read what people bring: their errors are about a file, unless they name nothing.
READERS = {
    "PIL": "it is no picture that can be read; "
    "open it in an image viewer, and leave it out or save it anew",
    "csv": "expected a table; see the options of the command for its separator",
    "pyarrow": "expected a whole parquet file",
    "safetensors": "expected a whole .safetensors file; a copy cut short is copied again",
    "safetensors_rust": "expected a whole .safetensors file; a copy cut short is copied again",
    "tarfile": "expected a whole tar",
    "yaml": "expected YAML; quote texts that hold signs of it",
    "zipfile": "expected a whole archive",
    "onnx": _NO_ONNX,
    "onnxruntime": _NO_ONNX,
    "huggingface_hub": "look at the name, at the network, and log in: hf auth login",
    "requests": "look at the address and the network",
    "httpx": "look at the address and the network",
    "aiohttp": "look at the address and the network",
    "botocore": "look at the address, the network and the credentials",
}
PICKLE = (
    "found weights in pickle's form, which can hold code and are not loaded; "
    "convert them to .safetensors first"
)
_PEER = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout",
    "gloo", "NCCL",
)  # fmt: skip


def say(error: Exception) -> None:
    """Print what went wrong on stderr: a message, or a bug's traceback."""
    text = message(error)
    if text is None or os.environ.get(SWITCH, "0") not in ("", "0"):
        print(scrubbed("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if text is None:
        text = (
            "this is a bug in vlp, or input of a form that it does not expect; "
            "please report it with the lines above"
        )

    rank = os.environ.get("RANK", "0")
    place = f" (rank {rank})" if rank != "0" else ""
    print(f"vlp{place}: {scrubbed(text)}", file=sys.stderr, flush=True)


def message(error: Exception) -> str | None:
    """The message of an error that a person can do something about; None for a bug."""
    # Kinds from the most telling one to the least: the first that fits speaks.
    library = type(error).__module__.partition(".")[0].lstrip("_")
    if isinstance(error, OSError) and library not in READERS:
        return _of_system(error)
    if isinstance(error, MemoryError) or _says(error, "can't allocate memory", "out of memory"):
        return (
            f"{_text(error) or 'out of memory'}; "
            "lower train.batch, raise train.micro_batches, or give the job more memory"
        )

    if isinstance(error, RuntimeError) and _says(error, "shared memory"):
        from vlp.data.processes import no_shared_memory

        return no_shared_memory()

    if isinstance(error, RuntimeError) and _says(error, "home directory"):
        return "a path begins with ~NAME, and this machine has no user NAME; write the path in full"

    if isinstance(error, RuntimeError) and _says(error, "Timed out waiting", "Timed out after"):
        return (
            f"another rank did not come to an exchange in time ({_text(error)[:200]}); "
            "look at what it does, in its log or with py-spy, or raise train.timeout_minutes"
        )

    # The rank that failed says why; the others only lost it.
    if _is_peer(error):
        return (
            "another process of this run ended; what happened to it stands above or in its own log"
        )

    # Ours are written for whoever reads them.
    if library == "vlp":
        return _text(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        return f"the package {error.name!r} is not installed: pip install {package}"

    # Before ValueError, of which these are kinds.
    is_of_text = isinstance(error, (UnicodeDecodeError, json.JSONDecodeError))
    if is_of_text or library in (*READERS, "pickle"):
        return _of_reader(error, library)
    if isinstance(error, ValueError):
        return _text(error)
    return None


def _of_system(error: OSError) -> str:
    """The message for an error of the operating system."""
    # Raised by our own code, with a message instead of a number.
    if error.errno is None or type(error).__module__.startswith("vlp."):
        return _text(error)

    # Some calls name no file; then our own frames may know which it was.
    path = _path_of(error)
    name = "a file" if path is None else str(path)

    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return (
                f"no space left for {name}{_room(path)}; "
                "make room or choose another disk. What was whole before still is"
            )
        case errno.EFBIG:
            return (
                f"{name} is larger than a file may be here; raise ulimit -f or choose another disk"
            )
        case errno.EROFS:
            return (
                f"{name} lies on a file system that can only be read; "
                "choose another place with out=… or --to, --out"
            )
        case errno.EACCES | errno.EPERM:
            return (
                f"no right to use {name}{_owner(path)}; "
                "change its rights (chmod, chown) or choose another place"
            )
        case errno.EISDIR:
            return (
                f"{name} is a folder, expected a file; name a file in it, or move the folder away"
            )
        case errno.ENOTDIR:
            return (
                f"{name} leads through something that is no folder, or is a file itself; "
                "expected a folder"
            )
        case errno.EEXIST | errno.ENOTEMPTY:
            return f"{name} already exists; choose another name, or move it away"
        case errno.ENOENT:
            return f"there is no {name}{_near(path)}"
        case errno.EMFILE | errno.ENFILE:
            return "too many open files; raise the limit: ulimit -n 65536"
        case errno.ENAMETOOLONG:
            return f"the name {name[:60]}… is too long for a file; choose a shorter one"
        case errno.EIO | errno.ESTALE:
            return (
                f"{name} cannot be read or written ({error.strerror}): "
                "a failing disk or mount? Try again, or a copy of it"
            )
    return f"{name}: {error.strerror or _text(error)}"


def _of_reader(error: Exception, library: str) -> str:
    """The message for an error of a library that reads what people bring."""
    path = _at_hand(error)
    place = "" if path is None else f"{path}: "
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return (
            f"{place}found byte 0x{byte:02x} at position {error.start}, "
            "expected text in UTF-8; save it as UTF-8"
        )
    if isinstance(error, json.JSONDecodeError):
        return (
            f"{place}found no JSON: {error.msg} in line {error.lineno}, column {error.colno}; "
            "expected a whole JSON file"
        )

    if library == "pickle":
        return f"{place}{PICKLE}"
    if _says(error, "No space left on device"):
        # Libraries in C tell a full disk in words of their own.
        filename = None if path is None else str(path)
        return _of_system(OSError(errno.ENOSPC, "", filename))
    return f"{place}{library} says: {_text(error)}; {READERS[library]}"


def _is_peer(error: Exception) -> bool:
    """Whether an error only tells that another rank went away."""
    distributed = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    return distributed and isinstance(error, RuntimeError) and _says(error, *_PEER)


def _says(error: Exception, *parts: str) -> bool:
    return any(part in str(error) for part in parts)


def _text(error: Exception) -> str:
    """An error's words; those of a loader process arrive with a traceback around them."""
    # DataLoader puts a worker's whole traceback into the message.
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    return text


def _path_of(error: OSError) -> Path | None:
    """The file that an error of the system is about."""
    name = error.filename2 or error.filename
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else _at_hand(error)


def _at_hand(error: Exception) -> Path | None:
    """The file that our own code was at when it failed: the innermost variable that holds one."""
    # From the inside: the innermost frame was nearest to the file.
    for frame in reversed(list(_own_frames(error))):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase):
                value = getattr(value, "name", None)  # a number, where it was opened by one
                if isinstance(value, str):
                    return Path(value)
            if isinstance(value, Path):
                return value
    return None


def _own_frames(error: Exception) -> Iterator[FrameType]:
    """The frames of our own code that an error came through, outermost first."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").split(".")[0] == "vlp":
            yield step.tb_frame
        step = step.tb_next


def _room(path: Path | None) -> str:
    """How much of the disk is free."""
    if path is None:
        return ""

    usage = shutil.disk_usage(existing(path))
    return f" ({usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free)"


def _owner(path: Path | None) -> str:
    """Whose a file is and what its rights are, where that can be seen."""
    if path is None:
        return ""
    try:
        status = existing(path).stat()
    except OSError:
        return ""
    mode = status.st_mode & 0o777
    return f" (owner {status.st_uid}, mode {mode:o}; you are {os.geteuid()})"


def _near(path: Path | None) -> str:
    """What there is instead of a path that does not exist."""
    if path is None:
        return ""
    folder = existing(path.parent)
    if folder != path.parent.absolute():
        return f"; of its folders only {folder} exists"

    names = []
    if folder.is_dir():
        names = [entry.name for entry in sorted(folder.iterdir())]
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f" in {folder}, did you mean {close[0]!r}?"

    shown = ", ".join(names[:10]) or "nothing"
    more = ", …" if len(names) > 10 else ""
    return f" in {folder}, which holds {shown}{more}"
