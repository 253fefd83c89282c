"""What FSDP2's ranks exchange, in which numbers, and how often."""

import dataclasses

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests import ranks
from tests.test_step import assert_close, make_batch, make_training, own_rows
from vlp import config
from vlp.engines.sharded import keeps_whole
from vlp.step import train_step

N_UNITS = 5  # two blocks a tower, and what lies around them


def noting(function, seen):
    """`function` of torch.distributed, which notes the dtype of FSDP2's flat tensors.

    The embeddings that objectives exchange have two dimensions.
    """

    def noted(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if tensors[1].ndim == 1:
            seen.append(str(tensors[1].dtype).removeprefix("torch."))
        return function(*args, **kwargs)

    return noted


# torch renamed them on its way to 2.15.
GATHER = ("all_gather_single", "all_gather_into_tensor")
REDUCE = ("reduce_scatter_single", "reduce_scatter_tensor")


def one_step(engine="fsdp2", micro_batches=3, **train):
    """Gradients of a step, the dtypes of what was gathered and reduced, and the scale."""
    training = make_training(micro_batches, engine=engine, double=False, train=train)
    gathered, reduced = [], []
    with pytest.MonkeyPatch.context() as patch:
        for names, seen in ((GATHER, gathered), (REDUCE, reduced)):
            name = next(name for name in names if hasattr(torch.distributed, name))
            function = getattr(torch.distributed, name)
            patch.setattr(torch.distributed, name, noting(function, seen))
        scale = train_step(training, make_batch(own_rows()))["scale"].item()

    moments = training.engine.state(everywhere=True)[1]
    first = {k: v.flatten().tolist() for k, v in moments.items() if k.startswith("exp_avg.")}
    return first, sorted(gathered), sorted(reduced), scale


def in_bf16(engine="fsdp2", micro_batches=3):
    return one_step(engine, micro_batches, precision="bf16")


def evaluation():
    """How many whole tensors an evaluation gathers, and how many weights it gets."""
    engine = make_training(engine="fsdp2", double=False).engine
    gathered = []
    with pytest.MonkeyPatch.context() as patch:
        whole = DTensor.full_tensor
        patch.setattr(DTensor, "full_tensor", lambda self: gathered.append(1) or whole(self))
        weights = engine.evaluation_model().state_dict()
    kept = engine.state(everywhere=True)[0]
    alike = all(torch.equal(value, kept[name]) for name, value in weights.items())
    on_meta = all(parameter.is_meta for parameter in engine.skeleton.parameters())
    return len(gathered), len(weights), alike, on_meta


def everything():
    return {
        "kept": one_step(),
        "anew": one_step(reshard=True),
        "bf16": in_bf16(),
        "evaluation": evaluation(),
    }


@pytest.fixture(scope="module")
def seen():
    """Of the first of two ranks."""
    return ranks.run(2, everything)[0]


def test_weights_are_gathered_once_a_step(seen):
    """Six forwards and three backwards of five units; with `reshard` each gathers anew."""
    gradients, gathered, reduced, _ = seen["kept"]
    assert gathered == ["float32"] * N_UNITS
    assert reduced == ["float32"] * N_UNITS

    same_gradients, anew, *_ = seen["anew"]
    assert len(anew) > 4 * N_UNITS
    assert gradients == same_gradients


def test_bf16_weights_and_float32_sums_give_the_gradient_of_one_process(seen):
    expected, *_, scale = in_bf16("ddp", 1)
    gradients, gathered, reduced, sharded_scale = seen["bf16"]

    # Scale and bias are a unit of their own: bf16 would round a scale of 100 to 98.9.
    assert gathered == ["bfloat16"] * N_UNITS + ["float32"]
    assert reduced == ["float32"] * (N_UNITS + 1)
    assert sharded_scale == scale

    whole = torch.tensor([x for values in expected.values() for x in values]).norm()
    compared = assert_close(gradients, expected, 0.02, 0.002 * whole)
    assert compared > 20


def test_an_evaluation_gathers_weights_and_no_moments(seen):
    n_gathered, n_weights, alike, on_meta = seen["evaluation"]
    assert n_gathered == n_weights > 20
    assert alike
    assert on_meta, "the engine holds the weights a second time"


@pytest.mark.parametrize(
    ("micro_batches", "reshard", "gpu_bytes", "expected"),
    [
        (1, "auto", 1e12, False),  # nothing to gather twice but for the backward
        (2, "auto", 1e12, True),
        (2, "auto", 1e3, False),  # too large
        (1, False, 1e3, True),
        (2, True, 1e12, False),
    ],
)
def test_whole_weights_are_kept_where_they_fit(
    micro_batches, reshard, gpu_bytes, expected, monkeypatch
):
    model = torch.nn.Linear(1000, 10)
    properties = dataclasses.make_dataclass("Properties", ["total_memory"])(gpu_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    options = config.Train(
        config.Duration(4, "steps"), batch=12, micro_batches=micro_batches, reshard=reshard
    )
    assert keeps_whole(model, options, torch.device("cuda"), torch.bfloat16) is expected
