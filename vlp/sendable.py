"""Exceptions that reach another process."""

from __future__ import annotations

import pickle


def sendable(error: BaseException) -> Exception:
    """The error, or where it cannot be pickled and read again, one that says the same: a ValueError
    or OSError where it is one, else a RuntimeError that names its kind. So is what is no Exception,
    like KeyboardInterrupt: it ends the process that it reached, not others.

    A process that waits for such an error would wait for ever, or take its sender for lost.
    """
    if isinstance(error, Exception):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        # Whatever an exception of a foreign library does when it is packed or unpacked.
        except Exception:
            pass

    name = type(error).__name__
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error) or name)
    return RuntimeError(f"{name}: {error}" if str(error) else name)
