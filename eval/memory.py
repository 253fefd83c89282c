"""The C library's allocator, told to keep what a model's forward pass frees for the next one."""

from __future__ import annotations

import ctypes
import platform

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed() -> bool:
    """Let freed memory stay with the process; False where the C library is not glibc.

    By default every block above 32 MiB, as the activations of a batch are, comes from the kernel
    and goes back to it: each forward pass on a CPU then meets hundreds of thousands of page faults.
    The most that was in use once stays reserved until the process ends.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(*pair) for pair in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)))
