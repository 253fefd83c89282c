"""How far a tool is: a line on stderr, overwritten on a terminal and now and then in a log."""

from __future__ import annotations

import sys
import time

QUIET_S = 10  # between two lines of progress where they do not overwrite one another


class Progress:
    """Shards, samples, throughput and time left on stderr: one line on a terminal, else a line now
    and then.
    """

    def __init__(self, title: str, sizes: list[int], unit: str = "shards") -> None:
        """`sizes`: of the jobs, in bytes say; each one's share of the whole in the time left.
        `unit`: what a job is.
        """
        self.title = title
        self.unit = unit
        self.n_jobs = len(sizes)
        self.size = sum(sizes)
        self.n_done = self.n_samples = self.size_done = 0
        self.start = time.monotonic()
        self.last_shown = self.start - QUIET_S

    def add(self, size: int, n_samples: int) -> None:
        """One more job is done, which was of this size and read so many samples."""
        self.n_done += 1
        self.n_samples += n_samples
        self.size_done += size

        now = time.monotonic()
        is_last = self.n_done == self.n_jobs
        on_terminal = sys.stderr.isatty()
        if not (on_terminal or is_last or now - self.last_shown >= QUIET_S):
            return
        self.last_shown = now
        line = self._line(max(now - self.start, 1e-9), is_last)

        # A terminal's line is overwritten by the next; a log file gets whole lines.
        if on_terminal:
            say(f"\r{line:<100}", end="\n" if is_last else "")
        else:
            say(line)

    def _line(self, elapsed_s: float, is_last: bool) -> str:
        rate = self.n_samples / elapsed_s
        line = f"{self.title}: {self.n_done}/{self.n_jobs} {self.unit}"
        line += f", {self.n_samples:,} samples, {rate:,.0f}/s"
        if is_last:
            return f"{line}, took {clock(round(elapsed_s))}"

        # Shards differ in size, so the time left goes by bytes.
        left_s = round(elapsed_s * (self.size - self.size_done) / max(self.size_done, 1))
        return f"{line}, {clock(left_s)} left"


def clock(seconds: int) -> str:
    """Seconds as people read them: 1:02:03, 2:03."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say(text: str, end: str = "\n") -> None:
    """A line on stderr, at once."""
    print(text, end=end, file=sys.stderr, flush=True)
