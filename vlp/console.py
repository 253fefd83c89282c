"""Where lines go: a terminal, with a bar below them while a run trains, or anything else, without.

A bar is drawn only where a person watches: standard output is a terminal that moves its cursor
(TERM is not dumb), no NO_COLOR and no CI in the environment, and this is the first rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

_LAYOUT = "step {n_fmt}/{total_fmt} |{bar:24}| {percentage:3.0f}%  {desc}"
_drawn: Bar | None = None  # the one of this process


def is_watched(stream: TextIO) -> bool:
    """Whether a bar on `stream` would be seen as one, by whoever runs this process."""
    environment = os.environ
    plain = environment.get("TERM") == "dumb" or "NO_COLOR" in environment or "CI" in environment
    first = environment.get("RANK", "0") == "0"
    return first and not plain and stream.isatty()


@contextlib.contextmanager
def above_bar() -> Iterator[None]:
    """Around a line to the console: the bar, where there is one, makes room and comes back."""
    if _drawn is None:
        yield
        return
    _drawn.hide()
    try:
        yield
    finally:
        _drawn.show()


class Bar:
    """Steps done of `total`, with a text behind them, on the last line of a terminal."""

    def __init__(self, step: int, total: int) -> None:
        # Only a run on a terminal waits for this import.
        from tqdm import tqdm  # type: ignore[import-untyped]

        class Quiet(tqdm):
            monitor_interval = 0  # no thread of its own beside those that fork

        # tqdm's own lock is of processes, and would start a tracker for it.
        Quiet.set_lock(threading.RLock())
        self._bar: Any = Quiet(
            total=total,
            initial=step,
            file=sys.stdout,
            dynamic_ncols=True,
            bar_format=_LAYOUT,
            miniters=0,
        )

        global _drawn
        _drawn = self

    def move(self, step: int, text: str) -> None:
        """Show `step`, ten times a second at most; it may be one less than before."""
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def note(self, text: str) -> None:
        """Show another text at once, for what takes long between two steps."""
        self._bar.set_description_str(text)

    def hide(self) -> None:
        self._bar.clear()
        sys.stdout.flush()  # before a line on another stream

    def show(self) -> None:
        self._bar.refresh()

    def close(self) -> None:
        """Leave the last state on a line of its own."""
        global _drawn
        _drawn = None
        self._bar.close()
