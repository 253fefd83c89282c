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
    is_final: Callable[[Exception], bool],
    told: Callable[[Exception, int], str],
    until: float = math.inf,
) -> _Result:
    """What `work` returns, which asks a store; raises at once an error that `is_final`, and after
    several tries an OSError that says what `told` makes of the last error and the number of tries.

    until: no try is begun later (of time.monotonic).
    """
    for attempt in range(TRIES):
        try:
            return work()
        # Each file system has errors of its own; all are tried again and then OSErrors.
        except Exception as error:
            if is_final(error):
                raise

            # Waiting frees no disk.
            pause_s = _PAUSE_S * 2**attempt
            is_last = attempt == TRIES - 1 or time.monotonic() + pause_s > until
            if is_full(error) or is_last:
                raise OSError(told(error, attempt + 1)) from error
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def fetching(url: str, folder: Path) -> Callable[[Exception, int], str]:
    """How `tried` tells that `url` could not be fetched into `folder`."""

    def told(error: Exception, n_tries: int) -> str:
        hint = _FULL.format(folder) if is_full(error) else ""
        return f"cannot fetch {url} ({n_tries} tries): {in_words(error)}{hint}"

    return told


def cause_of(error: Exception) -> Exception:
    """What a store answered to the last try, of an error that `tried` raised."""
    return error.__cause__ if isinstance(error.__cause__, Exception) else error


def is_full(error: Exception) -> bool:
    """Whether the disk is full."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def in_words(error: Exception) -> str:
    """An error in words. fsspec hides what http met behind a FileNotFoundError."""
    hidden = error.__cause__ if isinstance(error, FileNotFoundError) else None
    cause = hidden or error
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

    # aiohttp's errors have a status, gcsfs's a code, Azure's a status_code, those of the Hub's
    # client a response that has one; gcsfs puts a 403 into words.
    response = getattr(cause, "response", None)
    named = [getattr(cause, name, None) for name in ("status", "code", "status_code")]
    for status in (*named, getattr(response, "status_code", None)):
        if isinstance(status, int) and status:
            return int(status)
    return 403 if type(cause) is OSError and str(cause).startswith("Forbidden: ") else 0
