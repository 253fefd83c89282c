"""Runs under torchrun that lose a rank: torchrun starts all of them anew, and the run repeats what
an undisturbed one does. And runs that go on with other ranks and another batch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_train import ROOT
from tests.trials.conftest import CONFIG, Runs
from vlp import checkpoint

N_STEPS = 40


class Torchrun:
    """launch/torchrun.sh on this machine, with its own processes as torchrun starts them."""

    def __init__(self, runs: Runs, name: str, n_ranks: int, *overrides: str) -> None:
        config = runs.folder / f"{name}.yaml"
        config.write_text(CONFIG.format(out=runs.folder / name, data=runs.data))
        self.console = runs.folder / f"{name}.txt"
        programs = str(Path(sys.executable).parent)
        environment = os.environ | {
            "LOCAL_RANKS": str(n_ranks),
            "OMP_NUM_THREADS": "1",
            "PATH": programs + os.pathsep + os.environ["PATH"],
        }
        with self.console.open("w") as console:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch/torchrun.sh"), str(config), *overrides],
                cwd=ROOT,
                env=environment,
                stdout=console,
                stderr=subprocess.STDOUT,
            )

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks that run, in no order."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "launch/train.py" in " ".join(child.cmdline())]
        return []

    def wait(self) -> int:
        return self.process.wait(300)

    def said(self) -> str:
        return self.console.read_text(errors="replace")


def kill_one(runs: Runs, name: str, torchrun: Torchrun, which: int) -> list[int]:
    """SIGKILL a rank in the middle of the run; the process ids of all ranks at that moment."""
    deadline = time.monotonic() + 200
    while runs.n_lines(name) < N_STEPS // 4:
        assert torchrun.process.poll() is None and time.monotonic() < deadline, torchrun.said()
        time.sleep(0.01)
    started = sorted(torchrun.ranks(), key=lambda process: process.pid)
    pids = [process.pid for process in started]
    os.kill(pids[which], signal.SIGKILL)
    return pids


# Slow: torchrun and the imports of two sets of ranks take 15 s on two idle cores. That a rank's
# death ends the others, and that they go on exactly, tests/trials/test_kills.py tries in seconds.
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("n_ranks", "which"), [(2, 0), (4, 3)])
def test_torchrun_starts_all_anew_where_one_is_killed_and_nothing_is_lost(runs, n_ranks, which):
    options = (f"train.duration={N_STEPS}", "checkpoint.every=3", "checkpoint.keep=9")
    runs.finish("whole", *options, n_ranks=n_ranks)
    whole = runs.outcome("whole")
    assert [step for step, _ in whole["losses"]] == list(range(1, N_STEPS + 1))

    torchrun = Torchrun(runs, "run", n_ranks, *options)
    pids = kill_one(runs, "run", torchrun, which)
    assert torchrun.wait() == 0, torchrun.said()
    assert len(pids) == n_ranks and not any(map(psutil.pid_exists, pids))
    assert torchrun.said().count("continuing ") >= 1, torchrun.said()
    # The losses of all steps, each once, are those of the same samples in the same order.
    outcome = runs.outcome("run")
    assert [step for step, _ in outcome["losses"]] == [step for step, _ in whole["losses"]]
    assert outcome == whole


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_asked_to_stop_lets_the_ranks_save_and_starts_none_anew(runs):
    options = ("train.duration=400", "checkpoint.every=100%")
    torchrun = Torchrun(runs, "run", 2, *options)
    while runs.n_lines("run") < 3:
        assert torchrun.process.poll() is None, torchrun.said()
        time.sleep(0.01)
    torchrun.process.send_signal(signal.SIGTERM)
    assert torchrun.wait() != 0
    stopped_at = runs.n_lines("run")
    assert f"after step {stopped_at}; saved" in torchrun.said(), torchrun.said()
    assert checkpoint.newest(runs.folder / "run").name == f"step_{stopped_at:08d}"
    assert "continuing" not in torchrun.said()


LARGER = "stages=[{duration: 6}, {duration: 2, batch: 96}]"


def begun(runs: Runs, *options: str) -> str:
    """A run of eight steps and what goes on from its sixth."""
    runs.finish("run", *options)
    return f"resume={runs.folder / 'run/checkpoints/step_00000006'}"


def losses_after_six(runs: Runs, name: str) -> list[float]:
    losses = [loss for step, loss in runs.outcome(name)["losses"] if step > 6]
    assert len(losses) == 2
    return losses


def test_a_run_goes_on_with_another_batch_as_if_it_had_been_planned(runs):
    """A new batch is a stage from the step where it begins; up to there all is as it was."""
    options = ("train.duration=8", "checkpoint.keep=9")
    source = begun(runs, *options)
    life = runs.start("refused", *options, "train.batch=96", source)
    assert life.wait() == [1]
    assert "batch was 48, is 96" in life.said() and "as a stage" in life.said(), life.said()

    # As if the stages had been there from the start: the same samples, so the same numbers.
    runs.finish("whole", *options, LARGER)
    whole = runs.outcome("whole")
    runs.finish("same", *options, LARGER, source)
    same = runs.outcome("same")
    assert same["losses"] == whole["losses"][6:] and same["tensors"] == whole["tensors"]

    assert losses_after_six(runs, "run") != losses_after_six(runs, "whole")


# Slow: a second run at two ranks under FSDP2 would double the time of the one above.
@pytest.mark.slow
def test_batch_engine_and_number_of_ranks_may_change_at_once(runs):
    options = ("train.duration=8", "checkpoint.keep=9")
    source = begun(runs, *options)
    runs.finish("whole", *options, LARGER)
    runs.finish("other", *options, LARGER, source, "train.engine=fsdp2", n_ranks=2)
    expected = pytest.approx(losses_after_six(runs, "whole"), rel=1e-5)
    assert losses_after_six(runs, "other") == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_engine_goes_on_with_every_other_number_of_ranks(runs):
    options = ("train.duration=8", "checkpoint.keep=9")
    source = begun(runs, *options)
    expected = pytest.approx(losses_after_six(runs, "run"), rel=1e-5)

    n_tried = 0
    for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        for n_ranks in (2, 3, 4):
            name = f"{engine}_{n_ranks}"
            runs.finish(name, *options, source, f"train.engine={engine}", n_ranks=n_ranks)
            assert losses_after_six(runs, name) == expected, name
            n_tried += 1

            # And back to one process, from what the ranks have saved.
            saved = f"resume={runs.folder / name}/checkpoints/step_00000007"
            runs.finish(f"{name}_back", *options, saved)
            [(step, loss)] = runs.outcome(f"{name}_back")["losses"]
            assert (step, loss) == (8, pytest.approx(losses_after_six(runs, "run")[1], rel=1e-5))
    assert n_tried == 15
