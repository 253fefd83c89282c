"""SIGKILL at any moment: of a whole run, of one loader process, of one rank.

Nothing is lost, nothing hangs, nothing stays behind.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import pytest

from tests.trials.conftest import Runs
from vlp import checkpoint


def at_scale(n_few: int, n_many: int):
    """A trial run a few times in the fast suite and many times in the whole one."""
    slow = [pytest.mark.slow, pytest.mark.timeout(7200)]
    return pytest.mark.parametrize("trials", [n_few, pytest.param(n_many, marks=slow)])


@at_scale(1, 200)
def test_a_killed_run_goes_on_as_if_it_had_not_been(runs: Runs, trials):
    runs.finish("whole")
    whole = runs.outcome("whole")
    assert len(whole["losses"]) == 12

    n_killed = 0
    for trial in range(trials):
        name, overrides = f"run{trial}", (f"data.workers={trial % 2}", "resume=auto")
        for _ in range(runs.chance.choice([1, 1, 2])):
            life = runs.start(name, *overrides)
            wanted = min(runs.n_lines(name) + runs.chance.randrange(0, 9), 11)
            runs.until(life, lambda name=name, wanted=wanted: runs.n_lines(name) >= wanted)
            # A step and its checkpoint take some 20 ms: this falls into any part of both.
            time.sleep(runs.chance.random() * 0.05)
            life.signal(signal.SIGKILL)
            n_killed += life.wait() == [-signal.SIGKILL]
            assert not life.remains()
        runs.finish(name, *overrides)
        assert runs.outcome(name) == whole, trial
    assert n_killed >= trials * 0.9


@at_scale(1, 200)
def test_ranks_killed_while_they_save_go_on_as_if_they_had_not_been(runs: Runs, trials):
    """Of the parts any number may be on the disk: none of them is taken for a checkpoint."""
    runs.finish("whole", n_ranks=2)
    whole = runs.outcome("whole")

    n_inside = 0
    for trial in range(trials):
        name = f"run{trial}"
        checkpoints = runs.folder / name / checkpoint.FOLDER
        unfinished = checkpoints / f"step_{runs.chance.randrange(2, 11):08d}.tmp"
        life = runs.start(name, n_ranks=2)
        runs.until(life, unfinished.exists)
        # The first at once; parts, hashes and the last name take some 50 ms.
        time.sleep(runs.chance.random() * 0.05 if trial else 0)
        life.signal(signal.SIGKILL)
        life.wait()
        n_inside += unfinished.exists()

        assert not life.remains()
        assert checkpoint.newest(runs.folder / name) is not None
        runs.finish(name, "resume=auto", n_ranks=2)
        assert runs.outcome(name) == whole, trial
        assert not list(checkpoints.glob("*.tmp"))
    # The others met a moment between two saves.
    assert n_inside >= (trials - 1) * 0.3


# That it is told, tests/data/test_processes.py shows in the fast suite.
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_killed_loader_process_ends_the_run_with_advice_and_it_goes_on_exactly(runs: Runs):
    runs.finish("whole", "train.duration=40", "checkpoint.every=100%")
    whole = runs.outcome("whole")

    n_killed = 0
    for trial in range(50):
        name = f"run{trial}"
        overrides = ("train.duration=40", "checkpoint.every=5", f"data.workers={1 + trial % 2}")
        life = runs.start(name, *overrides)
        wanted = runs.chance.randrange(1, 30)
        runs.until(life, lambda name=name, wanted=wanted: runs.n_lines(name) >= wanted)
        with suppress(IndexError, ProcessLookupError):  # the run came to its end before
            os.kill(runs.chance.choice(life.loader_processes()), signal.SIGKILL)
        since = time.monotonic()
        [code] = life.wait(60)

        if code:  # else the batches that were still needed had been made
            n_killed += 1
            assert code == 1 and time.monotonic() - since < 20
            assert "a loader process died (killed by SIGKILL)" in life.said(), life.said()
            assert "data.workers=0" in life.said() and "Traceback" not in life.said()
            runs.finish(name, *overrides, "resume=auto")
        assert not life.remains()
        assert runs.outcome(name) == whole, trial
    assert n_killed >= 30


# One that fails, tests/trials/test_failing_rank.py shows in the fast suite.
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_rank_that_dies_takes_the_others_with_it(runs: Runs):
    runs.finish("whole", "train.duration=30", "checkpoint.every=100%", n_ranks=2)
    whole = runs.outcome("whole")

    for trial in range(20):
        name, dead = f"run{trial}", trial % 2
        overrides = ("train.duration=30", "checkpoint.every=3", f"data.workers={trial // 2 % 2}")
        life = runs.start(name, *overrides, n_ranks=2)
        wanted = runs.chance.randrange(4, 20)
        runs.until(life, lambda name=name, wanted=wanted: runs.n_lines(name) >= wanted)
        # That of step 3 is written beside the steps, and may stand later than they do.
        runs.until(life, lambda name=name: checkpoint.newest(runs.folder / name) is not None)
        life.signal(signal.SIGKILL, ranks=[dead])
        since = time.monotonic()
        codes = life.wait(60)

        assert codes[dead] == -signal.SIGKILL and codes[1 - dead] > 0, (codes, life.said())
        assert time.monotonic() - since < 30 and not life.remains()
        assert (
            "another process of this run ended" in life.said() and "Traceback" not in life.said()
        ), life.said()
        assert checkpoint.newest(runs.folder / name) is not None
        runs.finish(name, *overrides, "resume=auto", n_ranks=2)
        assert runs.outcome(name) == whole, trial
