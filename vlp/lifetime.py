"""When a process ends: signals that ask a run to stop or end a command, and children that end with
their parent. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, connection, parent_process
from types import FrameType, TracebackType
from typing import Any

# Ctrl-C, a scheduler's notice, a closed terminal, and what SLURM's --signal=USR1@… sends.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# `timeout` and some launchers send one signal twice, to the process and to its group.
_ONE_ACT_S = 0.5

_pending: StopRequest | None = None  # of this process, while it can save


class Stopped(Exception):
    """A signal ended a run before its last step; it was saved. `signum` is the signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.status = 128 + signum  # as shells and schedulers read it


class PutOff(Stopped):
    """A run lacked something that will come again, such as a store, and was saved; the same command
    goes on later.
    """

    def __init__(self, message: str) -> None:
        super().__init__(0, message)
        self.status = os.EX_TEMPFAIL


class Interrupted(Exception):
    """Work that can be done again, such as an evaluation, was given up because the process was
    asked to stop.
    """


class Ended(BaseException):
    """A signal ends a command that has nothing to save: what is finished is on the disk. No
    Exception, which a bad sample is taken for. `outcome` says what is finished.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum
        self.outcome = "the same command goes on with what is not finished"


class _CutShort(BaseException):
    """Raised by a signal inside `cut_short`. No Exception, which a bad sample is taken for."""


class StopRequest:
    """Remembers the first signal that asks this process to stop; a second one ends it at once, as
    if nothing was caught.

    A context: inside it the signals of ASKING are caught, but for those that the process was
    started to ignore (nohup). `received` is the signal's number, 0 before.
    """

    def __init__(self) -> None:
        self.received = 0
        self.lacks = ""  # what the run cannot go on without, in words
        self.may_interrupt = False  # whether a signal ends what the main thread is doing now
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        global _pending
        _pending = self

        # Python sets no handlers in other threads.
        if threading.current_thread() is threading.main_thread():
            for signum in ASKING:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._receive)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _pending
        _pending = None
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @property
    def asked(self) -> bool:
        """Whether this process is to stop: by a signal, or for want of something."""
        return self.received != 0 or self.lacks != ""

    @contextmanager
    def console(self) -> Iterator[None]:
        """Around lines to the console: where nobody reads it any more (`| head`), that asks to
        stop, too.
        """
        try:
            yield
        except BrokenPipeError:
            silence_console()
            self.received = self.received or signal.SIGPIPE

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        """The handler of every signal of ASKING."""
        now = time.monotonic()
        if not self.received:
            self.received, self._since = signum, now
            _announce(signum)
            if self.may_interrupt:
                raise _CutShort
        elif now - self._since > _ONE_ACT_S:
            # Asked twice: whoever waits no longer is served by the system's own handler.
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def _announce(signum: int) -> None:
    """Say, on the first rank, what comes of the first signal."""
    if os.environ.get("RANK", "0") != "0":
        return
    name = signal.Signals(signum).name
    line = f"\n{name}: saving after this step; the same again ends the run at once\n"

    # os.write, because a handler may come in the middle of a print.
    os.write(2, line.encode())


@contextmanager
def ending() -> Iterator[None]:
    """Around a command that a signal ends at once: in the place of Python's answer to it raises
    Ended. The processes that multiprocessing started here are ended first; a second signal meets
    the system's own handler.
    """
    before: dict[int, Any] = {}

    def end(signum: int, frame: FrameType | None) -> None:
        for caught in before:
            signal.signal(caught, signal.SIG_DFL)
        # A pool would wait for what they have begun, which may take minutes.
        for child in active_children():
            child.terminate()
        raise Ended(signum)

    # Python sets no handlers in other threads.
    if threading.current_thread() is threading.main_thread():
        for asking in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(asking) is not signal.SIG_IGN:
                before[asking] = signal.signal(asking, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def pending() -> StopRequest | None:
    """The request that this process listens for, if it does."""
    return _pending


def give_way() -> None:
    """Raise Interrupted if this process was asked to stop. Long work that can be done again calls
    it now and then.
    """
    if _pending is not None and _pending.received:
        raise Interrupted


@contextmanager
def cut_short() -> Iterator[None]:
    """Around work that may wait for ever, such as a read from a dead mount, and can be made again.

    A signal that asks to stop ends it at once, and the block is left without an error.

    Python goes on with an interrupted system call unless the signal's handler raises.
    """
    if _pending is None:
        yield
        return
    _pending.may_interrupt = not _pending.received
    try:
        yield
    except _CutShort:
        pass
    finally:
        _pending.may_interrupt = False


def launcher_grace_s() -> float | None:
    """How long the launcher lets its processes live that were asked to stop; None without one that
    kills them.
    """
    # Set by torch's launcher, which torchrun and accelerate start; it reads the same variable.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))


def silence_console() -> None:
    """Send whatever is still printed to nowhere, so that a reader who went away raises no further
    error.
    """
    # The descriptor itself, because Python flushes what is buffered once more at the end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def end_with_parent() -> None:
    """End this process as soon as its parent is gone, even by SIGKILL. For processes started by
    multiprocessing.

    A child that lived on would hold memory and devices, or write the very files that the next call
    writes.
    """
    parent = parent_process()
    assert parent is not None, "only a process that multiprocessing started has such a parent"

    # The sentinel becomes ready when the parent ends, whatever ends it.
    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# What holds more than a command needs.
_releases: list[Callable[[], None]] = []


def when_done(release: Callable[[], None]) -> None:
    """Call `release` at the end of each command of this process, whatever ends it."""
    _releases.append(release)


def release_all() -> None:
    """Give back what this process holds beyond a command."""
    for release in _releases:
        release()
