"""Progress of one process on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator


def progress(things: list, verb: str, n_images: int = 1) -> Iterator:
    """The things, with a line on a terminal that says how far, how fast and how long still. Each is
    `n_images` images.
    """
    started = shown = time.monotonic()
    for i, thing in enumerate(things, 1):
        yield thing

        now = time.monotonic()
        is_last = i == len(things)
        if not sys.stderr.isatty() or not (is_last or now - shown > 0.2):
            continue
        shown = now

        # Since the start, not since the last line: the time left then jumps less.
        rate = i / (now - started)
        left_s = (len(things) - i) / rate
        position = f"{i * n_images} of {len(things) * n_images} images {verb}"
        line = f"\r{position}, {rate * n_images:.0f}/s, {left_s:.0f} s left "
        print(line, end="\n" if is_last else "", file=sys.stderr, flush=True)
