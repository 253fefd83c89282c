"""Every engine equals one process, and what any engine saves continues in any other at another
number of ranks.
"""

import os
import time

import pytest
import torch

from tests import ranks
from tests.test_step import assert_close, make_batch, make_training, own_rows
from vlp import checkpoint
from vlp.saving import Saver
from vlp.staging import held
from vlp.step import train_step

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CLIP_NORM = 0.05  # small enough to clip, so that the norm is tested too


def as_lists(tensors):
    return {name: value.flatten().tolist() for name, value in tensors.items()}


def continue_from(engine, micro_batches, steps, read=None, write=None):
    """`steps` float32 updates, from the checkpoint in the run's folder `read`; the last state goes
    to the run's folder `write`.
    """
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    saved = read and checkpoint.load(checkpoint.newest(read))
    training = make_training(
        micro_batches,
        engine=engine,
        double=False,
        clip_norm=CLIP_NORM,
        weights=read and saved.model,
    )
    if read:
        training.engine.load_moments(saved.optimizer)
        training.step = 1
    norms = [train_step(training, make_batch(own_rows()))["grad_norm"].item() for _ in range(steps)]
    model, moments = training.engine.state(everywhere=True)
    if write:
        save(training, write)
    with torch.no_grad():
        features = training.engine.evaluation_model()(make_batch().image).image
    return as_lists(model), as_lists(moments), norms, features.flatten().tolist()


def save(training, run):
    """Write a checkpoint as a run does: in parts where there are several ranks."""
    saver = Saver(run, keep=2)
    state = {"step": training.step, "tables": saver.staging.tables}
    tensors = held(training, saver.staging)
    saver.write(training.step, checkpoint.Contents(**tensors, state=state), time.monotonic())
    saver.wait()


def check(result, expected):
    """Weights, both moments, norms and embeddings, to float32's precision.

    A tensor's error is held against the whole model's norm too: the keys' biases have no gradient
    but rounding (softmax does not see them), and AdamW's first steps make a full step of that.
    """
    for own, wanted in zip(result[:2], expected[:2]):
        whole = torch.tensor([x for values in wanted.values() for x in values]).norm()
        compared = assert_close(own, wanted, 1e-5, 1e-6 * whole)
        assert compared > 20
    assert result[2] == pytest.approx(expected[2], rel=1e-5)
    assert result[3] == pytest.approx(expected[3], abs=1e-5)


@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp2",
        "zero2",
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_engine_equals_one_process_and_states_travel(engine, tmp_path):
    """Two steps on two ranks; then step two again from one process's state, and by one process from
    theirs.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    expected = continue_from("ddp", 1, 2)
    continue_from("ddp", 1, 1, write=one)
    for result in ranks.run(2, continue_from, engine, 3, 2):
        check(result, expected)
    for result in ranks.run(2, continue_from, engine, 3, 1, one):
        check((*result[:2], [expected[2][0], *result[2]], result[3]), expected)
    ranks.run(2, continue_from, engine, 3, 1, None, two)
    assert checkpoint.in_parts(checkpoint.newest(two))
    result = continue_from("ddp", 1, 1, read=two)
    check((*result[:2], [expected[2][0], *result[2]], result[3]), expected)


def states(engine, steps, read=None, write=None):
    """All weights and moments after `steps` updates, exactly."""
    saved = read and checkpoint.load(checkpoint.newest(read))
    training = make_training(1, engine=engine, double=False, weights=read and saved.model)
    if read:
        training.engine.load_moments(saved.optimizer)
        training.step = saved.state["step"]
    for _ in range(steps):
        train_step(training, make_batch(own_rows()))
    if write:
        save(training, write)
    model, moments = training.engine.state(everywhere=True)
    return as_lists(model), as_lists(moments)


# What four ranks read again, tests/test_read_once.py shows in the fast suite.
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_four_ranks_go_on_bit_for_bit(engine, tmp_path):
    """Sums of more than two numbers depend on where they lie in what the ranks exchange."""
    whole = ranks.run(4, states, engine, 3)
    ranks.run(4, states, engine, 1, None, tmp_path)
    assert ranks.run(4, states, engine, 2, tmp_path) == whole
