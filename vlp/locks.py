"""One call at a time writes into a folder, and the others are told who does.

A lock is an advisory flock on a small file, so that it ends with its process whatever ends that:
there are no stale ones. The file says who holds it, for the message that a second call gets. Shares
(`--part K/N`) hold the folder together, and exclude calls for the whole, the same share, and shares
of another number. Where the file system knows no locks, that is said once, and work goes on
without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vlp import log
from vlp.privacy import scrubbed

NAME = ".lock"
OF_RUNS = (
    "Wait until it is done, or stop it and go on with resume=auto; "
    "or choose another folder with out=…"
)
# what a file system without locks answers
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
_TRIES = 40  # looks, 50 ms apart, for the owner to have written its name

_held: Counter[Path] = Counter()  # by this process, which may enter again


class InUse(RuntimeError):
    """Another process writes there."""


@contextmanager
def held(
    target: Path, *, advice: str, beside: bool = False, part: tuple[int, int] = (1, 1)
) -> Iterator[None]:
    """Hold `target` while the block runs; raises InUse, which names the owner, host and age, and
    ends in `advice`.

    beside: the lock lies beside `target`, which is replaced as a whole, and else in it; folders
    that are missing are made, and go again if they are empty in the end. part: (K, N), a share of
    the work in this folder.
    """
    # The owner's message has to make sense from any folder.
    target = target.absolute()
    path = target.with_name(f".{target.name}{NAME}") if beside else target / NAME
    k, n = part

    with ExitStack() as stack:
        stack.enter_context(_folders(path.parent))
        stack.enter_context(_locked(path, target, advice, shared=n > 1))
        if n > 1:
            # Shares of another number would write the same files.
            share = path.with_name(f"{path.name}-{k}-of-{n}")
            others = [other for other in _shares(path) if not other.name.endswith(f"-of-{n}")]
            _refuse(target, [other for other in others if _is_held(other)], advice)
            stack.enter_context(_locked(share, target, advice))
        yield


def refuse_if_held(target: Path, *, advice: str) -> None:
    """Raise InUse where another process holds the whole of `target`, without taking it."""
    # Only a look: the call that takes the lock comes later, after long checks.
    path = target.absolute() / NAME
    if path.exists() and not _held[path.resolve()] and _is_held(path):
        _refuse(target, [path], advice)


@contextmanager
def _locked(path: Path, target: Path, advice: str, shared: bool = False) -> Iterator[None]:
    """Hold the lock of one file, alone or with others that share it."""
    # A tool that calls another one enters its own folder again.
    key = path.resolve()
    if _held[key]:
        yield
        return

    # Another process may hold it for a moment only, to look whether it is held.
    descriptor = None
    for pause_s in (0, 0.05, 0.05):
        time.sleep(pause_s)
        descriptor = _take(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        if descriptor is not None:
            break
    if descriptor is None:
        _refuse(target, [path, *filter(_is_held, _shares(path))], advice)

    assert descriptor is not None  # `_refuse` has raised
    _held[key] += 1
    try:
        if not shared:
            _sign(descriptor)
        yield
    finally:
        _held[key] -= 1
        _release(path, descriptor, shared)


def _take(path: Path, kind: int) -> int | None:
    """An open file that holds the lock, or None where others hold it."""
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            log.warn(
                f"{path.parent} knows no locks ({error.strerror}); "
                "see to it that only one call works there"
            )
            return descriptor

        # Whoever held it before may have removed the file meanwhile, and a third made a new one.
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
        os.close(descriptor)


def _open(path: Path) -> int:
    """The lock's file, made if need be; never through a link that somebody else put there."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, flags | os.O_RDONLY)  # another user's, left by a kill


def _release(path: Path, descriptor: int, shared: bool) -> None:
    """Remove the file while it is still held, so that none is removed that another holds."""
    try:
        if shared:
            with contextlib.suppress(OSError):
                # Only the last one of those who share it gets it for itself.
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> bool:
    """Whether some process holds the lock of this file for itself alone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _shares(path: Path) -> list[Path]:
    """The files of the shares that hold, or held, a folder together."""
    return sorted(path.parent.glob(f"{path.name}-*-of-*"))


def _sign(descriptor: int) -> None:
    """Write into the lock's file who holds it."""
    # Without secrets, which a command line may hold; others read this file.
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": scrubbed(command)[:200],
        "since": round(time.time(), 1),
    }

    # A file of another user, or a full disk: the lock holds all the same.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _refuse(target: Path, paths: list[Path], advice: str) -> None:
    """Raise InUse with what the locks' files say of their owners, if there are any."""
    if not paths:
        return

    owners = [owner for owner in map(_owner, paths) if owner]
    names = "; ".join(owners) or "another process, which did not write down its name"
    raise InUse(f"{target} is in use by {names}. {advice}")


def _owner(path: Path) -> str:
    """Who holds a lock, in words; empty where its file does not say."""
    for _ in range(_TRIES):
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            pid, host = owner["pid"], owner["host"]
        except (OSError, ValueError, KeyError, TypeError):
            held_by_shares = path.name.endswith(NAME) and bool(_shares(path))
            if held_by_shares or not path.exists():
                return ""
            time.sleep(0.05)
            continue

        # The one before, which was killed: the new one is about to sign.
        if host == socket.gethostname() and not is_alive(pid):
            time.sleep(0.05)
            continue

        age = age_text(time.time() - owner["since"])
        return f"{owner['command']!r} (process {pid} on {host}, for {age})"
    return ""


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; signal 0 only asks."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def age_text(seconds: float) -> str:
    """A span of time in its largest fitting unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{max(seconds, 0):.0f} s"


@contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; those that are empty in the end go again."""
    created = []
    missing = folder
    while not missing.exists():
        created.append(missing)
        missing = missing.parent

    folder.mkdir(parents=True, exist_ok=True)

    try:
        yield
    finally:
        # From the innermost; rmdir refuses a folder that holds something.
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
