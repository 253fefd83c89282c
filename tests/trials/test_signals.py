"""Each signal that asks to stop, whatever the run is doing: it saves, leaves within the grace that
schedulers give, and goes on exactly.
"""

from __future__ import annotations

import itertools
import signal
import time

import pytest

from tests.trials.conftest import Runs
from vlp import checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
DOING = ("computing", "waiting", "saving")
GRACE_S = 25  # torchrun and Kubernetes kill after 30 s
FEW = [  # one of each kind in the fast suite
    (signal.SIGUSR1, "saving", 1, 0),
    (signal.SIGTERM, "waiting", 1, 0),
    (signal.SIGINT, "computing", 2, 0),
]
ALL = list(itertools.product(SIGNALS, DOING, (1, 2), (0, 2)))
assert len(ALL) == 48 and set(FEW) < set(ALL)
STUCK = (  # four steps of data, and then none
    "data.sources=[{name: webdataset, pipeline: 'tests.data.stuck:samples', samples: 4000}]",
    "train.batch=64",
    "objective={infonce: {}}",
)


@pytest.mark.parametrize(
    ("signum", "doing", "n_ranks", "n_workers"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in ALL],
)
def test_a_signal_saves_and_leaves(runs: Runs, signum, doing, n_ranks, n_workers):
    options = ("train.duration=60", "checkpoint.keep=3", f"data.workers={n_workers}")
    options += STUCK if doing == "waiting" else ()
    every = "checkpoint.every=" + ("1" if doing == "saving" else "100%")
    folder = runs.folder / "run" / checkpoint.FOLDER

    life = runs.start("run", *options, every, n_ranks=n_ranks)
    runs.until(life, lambda: runs.n_lines("run") >= 4)
    if doing == "waiting":
        time.sleep(1)
    elif doing == "saving":
        runs.until(life, lambda: any(folder.glob("*.tmp")))
    since = time.monotonic()
    life.signal(signum)
    codes = life.wait(60)

    assert codes == [128 + signum] * n_ranks, life.said()
    assert time.monotonic() - since < GRACE_S and not life.remains()
    stopped_at = runs.n_lines("run")
    assert f"stopped by {signum.name} after step {stopped_at}; saved" in life.said(), life.said()
    assert checkpoint.newest(runs.folder / "run").name == f"step_{stopped_at:08d}"
    if doing == "waiting":
        assert stopped_at == 4  # its data will never come
    else:
        rest = ("checkpoint.every=100%", "resume=auto")
        runs.finish("run", *options, *rest, n_ranks=n_ranks)
        runs.finish("whole", *options, "checkpoint.every=100%", n_ranks=n_ranks)
        assert runs.outcome("run") == runs.outcome("whole")
