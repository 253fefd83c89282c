"""From what the training loop measured to console, metrics.jsonl, trackers and results.json."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlp import config as configuration
from vlp import dist, log
from vlp.config import Config, Plan
from vlp.files import write_atomically

LARGEST_IGNORED = 0.2  # share of pairs that a term's masks leave out, above which a run is warned


class Reporter:
    """Reports of one run, written by the first rank."""

    def __init__(self, config: Config, plan: Plan, step: int) -> None:
        self.plan, self.run, self.main = plan, Path(config.out), dist.is_main()
        self.warned: set[str] = set()  # names of what was warned of already

        if self.main:
            self.run.mkdir(parents=True, exist_ok=True)
            self.trackers = log.Trackers(config.log.trackers, self.run, configuration.shown(config))

            # Not before everything was checked: config.yaml makes it a run.
            write_atomically(self.run / "config.yaml", configuration.dump(config).encode())
            self.metrics = log.Metrics(self.run / "metrics.jsonl", resumed_step=step)

        # Speeds count from here: what the start took is no training time.
        self.first = self.last = step
        self.waited_s = 0.0
        self.started = self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    def training(
        self, step: int, scalars: Mapping[str, float], counters: Mapping[str, float]
    ) -> None:
        """Report the scalars of `step` with the speed since the last report."""
        now = time.perf_counter()
        passed = now - self.since

        # On every rank: the clocks below have to run alike.
        speed = {
            "samples_s": (step - self.last) * self.plan.batch / passed,
            "data_wait": self.waited_s / passed,
        }
        eta_s = (now - self.started) / (step - self.first) * (self.plan.total - step)
        if self.main:
            self.metrics.write(step, "train", {**scalars, **speed, **counters})
            self.trackers.write(step, {**scalars, **speed})

            # A line of the console has no room for what changes slowly.
            shown = {
                name: value
                for name, value in scalars.items()
                if name != "log_n" and not name.startswith("space.")
            }
            log.say(log.progress(step, self.plan.total, {**shown, **speed}, eta_s))
            self._warn_of_ignored(scalars)
        self.last, self.since, self.waited_s = step, now, 0.0

    def _warn_of_ignored(self, scalars: Mapping[str, float]) -> None:
        """Once for each term whose masks leave much of the batch out."""
        for name, share in scalars.items():
            many = name.endswith(".ignored") and share > LARGEST_IGNORED
            if not many or name in self.warned:
                continue
            self.warned.add(name)
            log.warn(
                f"{name}: {share:.0%} of the pairs that are no positives are ignored, above "
                f"{LARGEST_IGNORED:.0%}: little is left to compare with; raise the threshold of "
                "the term's `ignore`, or the batch"
            )

    def evaluation(self, step: int, records: list[dict[str, Any]]) -> None:
        """Report the records of an evaluation; those of the last step become the run's
        results.json.
        """
        if not self.main:
            return
        values = {}
        for record in records:
            for name, value in record["metrics"].items():
                values[f"{record['label']}.{name}"] = value
        self.metrics.write(step, "eval", values)
        self.trackers.write(step, values)

        # Only of the end: the page and other readers take results.json for the run's own.
        if step == self.plan.total:
            done = [record for record in records if "error" not in record]
            text = json.dumps(done, indent=1) + "\n"
            write_atomically(self.run / "results.json", text.encode())

        scores = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.say(f"step {step}  {scores}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is no training time."""
        start = time.perf_counter()
        yield
        passed = time.perf_counter() - start
        self.started += passed
        self.since += passed

    def close(self) -> None:
        if self.main:
            self.metrics.close()
            self.trackers.close()
