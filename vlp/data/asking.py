"""Asking a store again: how often, and which of its errors are final."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

TRIES = 4
_PAUSE_S = 1.0  # before the second try; doubled before each further one
_TOO_MANY = 429  # requests, says http: later ones are answered
_FULL = "; the disk of {} is full, set cache_gb lower or VLP_CACHE elsewhere"
_Result = TypeVar("_Result")


def tried(
    work: Callable[[], _Result],
    url: str,
    folder: Path,
    is_final: Callable[[Exception], bool],
    until: float = math.inf,
) -> _Result:
    """What `work` returns, which asks a store for `url` and may write into `folder`; raises OSError
    after several tries, none begun after `until` (of time.monotonic), and at once an error that
    `is_final`.
    """
    for attempt in range(TRIES):
        try:
            return work()
        # Each file system has errors of its own; all are tried again and then OSErrors.
        except Exception as error:
            if is_final(error):
                raise

            # Waiting frees no disk.
            disk_is_full = is_full(error)
            pause_s = _PAUSE_S * 2**attempt
            is_last = attempt == TRIES - 1 or time.monotonic() + pause_s > until
            if disk_is_full or is_last:
                hint = _FULL.format(folder) if disk_is_full else ""
                raise OSError(
                    f"cannot fetch {url} ({attempt + 1} tries): {_told(error)}{hint}"
                ) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def cause_of(error: Exception) -> Exception:
    """What a store answered to the last try, of an error that `tried` raised."""
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def is_full(error: Exception) -> bool:
    """Whether the disk is full."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def _told(error: Exception) -> str:
    """An error in words. fsspec hides what http met behind a FileNotFoundError."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    return f"{type(cause).__name__}: {cause}"


def is_absent(error: Exception, url: str) -> bool:
    """Whether there is no such file. fsspec's http says so of every failure to open: 503, refused
    connections, timeouts.
    """
    return isinstance(error, FileNotFoundError) and _status(error, url) == 404


def is_refused(error: Exception, url: str) -> bool:
    """Whether there is no such file, or no right to it, or no package for its kind of address."""
    if isinstance(error, ImportError):
        return True
    status = _status(error, url)
    return 400 <= status < 500 and status != _TOO_MANY


def _status(error: Exception, url: str) -> int:
    """What http answered, or 0 where it did not; 404 where a file system knows no such file, or
    gives no right to it.
    """
    status = status_of(error)
    hidden = url.startswith(("http://", "https://")) and error.__cause__ is not None
    is_final = isinstance(error, FileNotFoundError | PermissionError) and not hidden
    return status or (404 if is_final else 0)


def status_of(error: BaseException) -> int:
    """What http answered; 0 where that is not known."""
    # fsspec hides one such error behind another, which may name a file that is there.
    cause: BaseException = error
    while isinstance(cause, FileNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__

    # aiohttp's errors have a status, those of the Hub's client a response that has one.
    response = getattr(cause, "response", None)
    status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    return status if isinstance(status, int) else 0
