"""SIGKILL at named moments of a save: while it is copied beside the next step, while the marker is
written, while an old checkpoint is removed.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.trials.conftest import Runs
from tests.trials.sudden_end import INSIDE, MOMENTS, OLD, STEP, UNFINISHED
from vlp import checkpoint
from vlp.pretrained.runs import FOLDER, looks_complete

N_STEPS = STEP + 2
CASES = [(n_ranks, moment) for n_ranks in (1, 2) for moment in (*MOMENTS, *INSIDE)]


# Killed at a random moment, tests/trials/test_kills.py shows it in the fast suite.
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_killed_at_a_moment_of_a_save_goes_on_as_if_it_had_not_been(runs: Runs):
    short = (f"train.duration={N_STEPS}",)
    whole = {}
    for n_ranks in (1, 2):
        runs.finish(f"whole{n_ranks}", *short, n_ranks=n_ranks)
        whole[n_ranks] = runs.outcome(f"whole{n_ranks}")

    n_killed = 0
    for number, (n_ranks, moment) in enumerate(CASES):
        name = f"run{number}"
        life = runs.start(name, *short, n_ranks=n_ranks, ends_at=moment)
        # The second rank waits for the first one, and may not have seen its end yet.
        [killed] = life.wait(ranks=[0])
        life.signal(signal.SIGKILL, ranks=[*range(1, n_ranks)])
        life.wait(ranks=[*range(1, n_ranks)])
        assert killed == -signal.SIGKILL, (moment, life.said())
        n_killed += 1
        assert not life.remains()

        # The run has the newest checkpoint that stands under its name.
        newest = checkpoint.newest(runs.folder / name)
        check_left_behind(newest.parent, moment)
        stands = moment.startswith(("prunes", "has removed"))
        assert newest.name == f"step_{STEP if stands else STEP - 1:08d}", moment
        assert checkpoint.load(newest).state["step"] == int(newest.name.removeprefix("step_"))

        runs.finish(name, *short, "resume=auto", n_ranks=n_ranks)
        assert runs.outcome(name) == whole[n_ranks], moment
        left = sorted(path.name for path in newest.parent.glob("step_*"))
        assert left == [f"step_{step:08d}" for step in (N_STEPS - 1, N_STEPS)], moment
    assert n_killed == 16


def check_left_behind(folder: Path, moment: str) -> None:
    """That the run ended at this very moment, by what lies on the disk."""
    assert folder.name == FOLDER
    unfinished, old = folder / UNFINISHED, folder / OLD
    n_files = len(list((folder / f"step_{STEP - 1:08d}").iterdir()))
    if moment == "has copied half":
        assert not unfinished.exists()
    elif moment == "has made the folder":
        assert not list(unfinished.iterdir())
    elif moment == "marks":
        assert len(list(unfinished.iterdir())) == n_files - 1
    elif moment == "has marked half":
        assert len(list(unfinished.iterdir())) == n_files and not looks_complete(unfinished)
    elif moment == "appears":
        assert len(list(unfinished.iterdir())) == n_files and looks_complete(unfinished)
    else:
        n_removed = {"prunes": 0, "has removed one file": 1, "has removed four files": 4}[moment]
        assert len(list(old.iterdir())) == n_files - n_removed
        assert looks_complete(old) == (n_removed == 0)
