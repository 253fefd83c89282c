"""Every engine equals one process, and what any engine saves continues in any other at another
number of ranks.
"""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import ranks
from tests.test_step import assert_close, make_batch, make_training, own_rows
from vlp import dist
from vlp.step import train_step

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
CLIP_NORM = 0.05  # small enough to clip, so that the norm is tested too


def as_lists(tensors):
    return {name: value.flatten().tolist() for name, value in tensors.items()}


def continue_from(engine, micro_batches, steps, read=None, write=None):
    """`steps` float32 updates, starting from the state in folder `read`; the last state goes to
    folder `write`.
    """
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    training = make_training(
        micro_batches,
        engine=engine,
        double=False,
        clip_norm=CLIP_NORM,
        weights=read and f"{read}/model",
    )
    if read:
        training.engine.load_moments(load_file(f"{read}/moments"))
        training.step = 1
    norms = [train_step(training, make_batch(own_rows()))["grad_norm"].item() for _ in range(steps)]
    model, moments = training.engine.state(everywhere=True)
    if write and dist.is_main():
        save_file(model, f"{write}/model")
        save_file(moments, f"{write}/moments")
    with torch.no_grad():
        features = training.engine.evaluation_model()(make_batch().image).image
    return as_lists(model), as_lists(moments), norms, features.flatten().tolist()


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
    one.mkdir()
    two.mkdir()
    expected = continue_from("ddp", 1, 2)
    continue_from("ddp", 1, 1, write=str(one))
    for result in ranks.run(2, continue_from, engine, 3, 2):
        check(result, expected)
    for result in ranks.run(2, continue_from, engine, 3, 1, str(one)):
        check((*result[:2], [expected[2][0], *result[2]], result[3]), expected)
    ranks.run(2, continue_from, engine, 3, 1, None, str(two))
    result = continue_from("ddp", 1, 1, read=str(two))
    check((*result[:2], [expected[2][0], *result[2]], result[3]), expected)
