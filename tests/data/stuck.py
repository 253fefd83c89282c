"""What does not go on: `pipeline: tests.data.stuck:samples`, whose data stop coming, and a rate."""

import os
import signal
import time
from multiprocessing import parent_process

from tests.data.material import encoded, picture

N_GIVEN = 256  # then nothing more comes, as from a dead mount


def samples(part, parts):
    yield from _given()
    time.sleep(3600)


def killed(part, parts):
    """Samples that a loader process does not live to give."""
    if parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from _given()


def rank_1_fails_and_rank_0_waits(part, parts):
    yield from _rank_1_fails(part, parts)
    time.sleep(3600)


def rank_1_fails_and_rank_0_goes_on(part, parts):
    yield from _rank_1_fails(part, parts)
    while True:
        yield from _given()


def _rank_1_fails(part, parts):
    yield from _given()
    if os.environ["RANK"] == "1":
        raise ValueError("told to fail on one rank")


def _given():
    for i in range(N_GIVEN):
        yield {"__key__": str(i), "png": encoded(picture(i)), "txt": f"caption {i}".encode()}


def halting_rate(step, warmup, total):
    """The whole rate, of `train.optimizer.schedule`; at step 6 it waits for the file that HALT
    names, where that is set.
    """
    halt = os.environ.get("HALT")
    while halt and step == 6 and not os.path.exists(halt):
        time.sleep(0.02)
    return 1.0
