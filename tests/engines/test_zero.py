"""What DeepSpeed is told, and what it makes of it."""

import os

import pytest
import torch

from tests import ranks
from tests.test_step import make_batch, make_training, own_rows
from vlp.step import train_step

LATE = "text.token_embedding.weight"


def without_state_of_two(training):
    """How many moments of a new engine its saved state lacks, whether all others were taken over,
    and whether those of two parameters without state, the last one among them, are still nothing.
    """
    _, moments = training.engine.state(everywhere=True)
    last = [name for name, p in training.engine.module.named_parameters() if p.requires_grad][-1]
    saved = {
        key: torch.full_like(value, 0.5)
        for key, value in moments.items()
        if key.partition(".")[2] not in (LATE, last)
    }

    training.engine.load_moments(saved)
    _, again = training.engine.state(everywhere=True)
    kept = [torch.equal(again[key], value) for key, value in saved.items()]
    missing = [again[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq") for name in (LATE, last)]
    return len(moments) - len(kept), all(kept), [not value.any() for value in missing]


def of_a_step(training):
    """Dtypes in which gradients travel, whole moments built for an evaluation, and whether its
    weights are those of the state.
    """
    import deepspeed.utils as deepspeed

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


def both():
    # DeepSpeed looks for ninja, and starts once a process.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    training = make_training(engine="zero2", double=False, train={"precision": "bf16"})
    return without_state_of_two(training), of_a_step(training)


@pytest.fixture(scope="module")
def of_ranks():
    return ranks.run(2, both)


def test_a_parameter_without_saved_state_starts_anew(of_ranks):
    """One that was locked, or had no gradient, until the checkpoint."""
    for (n_missing, all_kept, empty), _ in of_ranks:
        assert n_missing == 6 and all_kept and empty == [True] * 4


def test_gradients_travel_in_float32_and_an_evaluation_builds_no_moments(of_ranks):
    for _, (dtypes, n_built, n_of_a_state, n_weights, alike) in of_ranks:
        assert dtypes == ["torch.float32"]
        assert n_built == 0 and n_of_a_state > 2 * 20
        assert n_weights > 20 and alike
