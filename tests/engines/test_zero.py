"""What DeepSpeed is told, and what it makes of it."""

import os

import pytest
import torch

from tests import ranks
from tests.test_step import make_batch, make_training, own_rows
from vlp.step import train_step


def in_bf16():
    """Dtypes in which gradients travel, whole moments built for an evaluation, and whether its
    weights are those of the state.
    """
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    import deepspeed.utils as deepspeed

    training = make_training(engine="zero2", double=False, train={"precision": "bf16"})
    train_step(training, make_batch(own_rows()))
    dtypes = [str(dtype) for dtype in training.engine.zero.ipg_buckets]

    moments = []
    with pytest.MonkeyPatch.context() as patch:
        name = "safe_get_full_optimizer_state"
        function = getattr(deepspeed, name)
        patch.setattr(deepspeed, name, lambda *args: moments.append(1) or function(*args))
        model = training.engine.evaluation_model()
        n_built = len(moments)
        weights, _ = training.engine.state(everywhere=True)

    alike = [torch.equal(value, weights[name]) for name, value in model.state_dict().items()]
    return dtypes, n_built, len(moments), len(alike), all(alike)


def test_gradients_travel_in_float32_and_an_evaluation_builds_no_moments():
    for dtypes, n_built, n_of_a_state, n_weights, alike in ranks.run(2, in_bf16):
        assert dtypes == ["torch.float32"]
        assert n_built == 0 and n_of_a_state > 2 * 20
        assert n_weights > 20 and alike
