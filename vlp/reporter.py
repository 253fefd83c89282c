"""From what the training loop measured to console, metrics.jsonl, trackers and results.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save

from vlp import config as configuration
from vlp import dist, log
from vlp.config import Config, Plan
from vlp.console import Bar, is_watched
from vlp.files import write_atomically
from vlp.flops import Utilisation
from vlp.measurements import peak_memory

OUTCOMES = "results.items.safetensors"  # beside results.json, as vlp.eval.report.records has it
LARGEST_IGNORED = 0.2  # share of pairs that a term's masks leave out, above which a run is warned
# what a line of the console leaves to metrics.jsonl
_UNSHOWN = ("log_n", "text_tokens_s", "peak_resident_gib", "peak_device_gib", "fetched_gb")


class Reporter:
    """Reports of one run, written by the first rank."""

    def __init__(
        self, config: Config, plan: Plan, step: int, utilisation: Utilisation | None = None
    ) -> None:
        self.plan, self.run, self.main = plan, Path(config.out), dist.is_main()
        self.utilisation = utilisation
        self.warned: set[str] = set()  # names of what was warned of already
        self.bar: Bar | None = None
        self.shown: dict[str, float] = {}  # the bar's columns

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
        if self.main and is_watched(sys.stdout):
            self.bar = Bar(step, plan.total)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - start

    def stepped(self, step: int) -> None:
        """Move the bar, where there is one, to a step that is done."""
        if self.bar is not None and step > self.first:
            self.bar.move(step, log.columns(self.shown, self._eta_s(step)))

    def training(
        self, step: int, scalars: Mapping[str, float], counters: Mapping[str, float]
    ) -> None:
        """Report the scalars of `step` with the speed since the last report."""
        now = time.perf_counter()
        scalars = dict(scalars)
        speed = self._speed(step, now, scalars.pop("pictures"), scalars.pop("text_tokens"))
        speed |= _traffic(scalars)

        if self.main:
            speed |= peak_memory()
            self.metrics.write(step, "train", {**scalars, **speed, **counters})
            self.trackers.write(step, {**scalars, **speed})
            self._show(step, scalars, speed)
            self._warn_of_ignored(scalars)

        # On every rank: the clocks have to run alike.
        self.last, self.since, self.waited_s = step, now, 0.0

    def _speed(
        self, step: int, now: float, pictures: float, text_tokens: float
    ) -> dict[str, float]:
        """Rates of all ranks since the last report. pictures, text_tokens: of a rank's rows of this
        step, for which those of the steps before are taken to be alike.
        """
        passed_s = now - self.since
        steps_s = (step - self.last) / passed_s
        speed = {
            "samples_s": steps_s * self.plan.batch,
            "data_wait": self.waited_s / passed_s,
        }
        # Stored embeddings of texts have none.
        if text_tokens:
            speed["text_tokens_s"] = steps_s * text_tokens * dist.world_size()
        if self.utilisation is not None:
            speed["mfu"] = self.utilisation.mfu(steps_s * pictures, steps_s * text_tokens)
        return speed

    def _show(self, step: int, scalars: dict[str, float], speed: dict[str, float]) -> None:
        """The numbers of a step on the console: in the bar, or else as a line."""
        if self.bar is not None:
            self.shown = {"loss": scalars["loss"], "samples_s": speed["samples_s"]}
            self.stepped(step)
            return

        # A line has no room for what changes slowly.
        shown = {
            name: value
            for name, value in {**scalars, **speed}.items()
            if name not in _UNSHOWN and not name.startswith("space.")
        }
        log.say(log.progress(step, self.plan.total, shown, self._eta_s(step)))

    def _eta_s(self, step: int) -> float:
        """Seconds of training left, at the mean speed since the start."""
        passed_s = time.perf_counter() - self.started
        return passed_s / (step - self.first) * (self.plan.total - step)

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
        """Report the records of an evaluation."""
        if not self.main:
            return
        values = scores_of(records)
        self.metrics.write(step, "eval", values)
        self.trackers.write(step, values)

        scores = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.say(f"step {step}  {scores}")

    def results(self, records: list[dict[str, Any]]) -> None:
        """Write the records of the run's last step as its results.json, and the outcomes by unit
        beside it.
        """
        # Only of the end: the page and other readers take results.json for the run's own.
        if not self.main:
            return
        done = [record for record in records if "error" not in record]
        outcomes = {
            f"{record['label']}/{name}": value.contiguous()
            for record in done
            for name, value in record.get("items", {}).items()
        }

        # The outcomes first, as `vlp eval` writes them.
        write_atomically(self.run / OUTCOMES, save(outcomes))
        shown = [{key: part for key, part in record.items() if key != "items"} for record in done]
        write_atomically(self.run / "results.json", f"{json.dumps(shown, indent=1)}\n".encode())

    @contextmanager
    def paused(self, doing: str = "evaluating") -> Iterator[None]:
        """Time spent inside is no training time."""
        start = time.perf_counter()
        if self.bar is not None:
            self.bar.note(doing)
        yield
        passed = time.perf_counter() - start
        self.started += passed
        self.since += passed

    def close(self) -> None:
        # First: whatever is said after it stands below it.
        if self.bar is not None:
            self.bar.close()
        if self.main:
            self.metrics.close()
            self.trackers.close()


def _traffic(scalars: dict[str, float]) -> dict[str, float]:
    """What all ranks fetched of remote shards, and how many times the bytes of the samples read
    that is; taken out of `scalars`, the means of all ranks.
    """
    fetched_bytes = scalars.pop("fetched_bytes", None)
    used_bytes = scalars.pop("used_bytes", None)
    if fetched_bytes is None or not used_bytes:
        return {}
    return {
        "fetched_gb": fetched_bytes * dist.world_size() / 1e9,
        "read_amplification": fetched_bytes / used_bytes,
    }


def scores_of(records: list[dict[str, Any]]) -> dict[str, float]:
    """The scores of evaluation records by LABEL.METRIC."""
    scores: dict[str, float] = {}
    for record in records:
        label = record["label"]
        scores |= {f"{label}.{name}": value for name, value in record["metrics"].items()}
    return scores
