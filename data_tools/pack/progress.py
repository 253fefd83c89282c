"""How far one process is, how fast, and how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vlp.data_tools._run.progress import clock

_TERMINAL_S, _LINES_S = 0.2, 30.0  # between two lines

Thing = TypeVar("Thing")


def progress(
    things: list[Thing], verb: str, size: Callable[[Thing], int], n_before: int = 0
) -> Iterator[Thing]:
    """The things, while stderr says how many images of them are done: one line that moves on a
    terminal, elsewhere a line now and then. `n_before`: images that an earlier call had done.
    """
    total = n_before + sum(size(thing) for thing in things)
    started = shown = time.monotonic()
    n_done = 0
    on_terminal = sys.stderr.isatty()
    for thing in things:
        yield thing

        n_done += size(thing)
        now = time.monotonic()
        is_last = n_before + n_done == total
        due = now - shown > (_TERMINAL_S if on_terminal else _LINES_S)
        # A log of a short call stays empty.
        if not due and not (is_last and (on_terminal or shown > started)):
            continue
        shown = now

        # Since the start, not since the last line: the time left then jumps less.
        rate = n_done / max(now - started, 1e-9)
        left = clock(round((total - n_before - n_done) / max(rate, 1e-9)))
        line = f"{n_before + n_done:,} of {total:,} images {verb}, {rate:,.0f}/s, {left} left"
        if on_terminal:
            print(f"\r{line:<79}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
