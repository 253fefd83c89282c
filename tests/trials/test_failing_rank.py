"""A rank that fails ends the others within seconds, whatever they are waiting for."""

from __future__ import annotations

import time

import pytest

from tests.trials.conftest import Runs

END_WITHIN_S = 25


@pytest.mark.parametrize(
    "pipeline",
    [
        "rank_1_fails_and_rank_0_waits",
        pytest.param("rank_1_fails_and_rank_0_goes_on", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_ends_the_run(runs: Runs, pipeline):
    """Rank 0 sits in its own data, where no connection tells it anything, or in an exchange."""
    sources = f"[{{name: webdataset, pipeline: 'tests.data.stuck:{pipeline}', samples: 4000}}]"
    options = (f"data.sources={sources}", "train.batch=64", "objective={infonce: {}}")
    every = ("train.duration=60", "checkpoint.every=100%")

    life = runs.start("run", *options, *every, n_ranks=2)
    failing = life.consoles[1]
    runs.until(life, lambda: failing.exists() and "told to fail" in failing.read_text())
    since = time.monotonic()
    assert life.wait(60) == [1, 1], life.said()

    assert time.monotonic() - since < END_WITHIN_S
    assert life.said().count("told to fail on one rank") == 1, life.said()
    ended = ("rank 1 failed", "another process of this run ended")
    assert sum(life.consoles[0].read_text().count(words) for words in ended) == 1, life.said()
    assert not life.remains()
