"""The host waits for nothing between the first and the last line of a step that is not logged."""

import pytest
import torch

from tests import ranks
from tests.host_waits import HostWaits
from tests.test_step import NEGATIVES, make_batch, make_training, negatives_batch, own_rows
from vlp import config, dist
from vlp.step import train_step
from vlp.teacher import Teacher

MOVING = {"samples": 12}
# Several terms at once: a place names its file. What passes a mask stands by itself.
OBJECTIVES = {
    "pairs": {
        "infonce": {},
        "siglip": {},
        "sogclr": MOVING,
        "isogclr": MOVING,
        "fastclip": MOVING,
        "self_distillation": {},
    },
    "masks": NEGATIVES
    | {"hard_negatives": [{"form": form} for form in ("negclip", "own", "rank")]},
}


def waits_of(objective, micro_batches=1):
    """Waits of the third step: the first one checks norms and shapes, and no step but a later one
    reads a verdict.
    """
    training = make_training(micro_batches, objective=objective, double=False, clip_norm=1.0)
    if "self_distillation" in objective:
        model = training.engine.evaluation_model()
        options = config.Teacher(ema=0.9)
        training.teacher = Teacher(options, training.engine, model, training.objective.needs, {})

    make = negatives_batch if "hard_negatives" in objective else make_batch
    batch = make(own_rows())
    for _ in range(2):
        train_step(training, batch)
    with HostWaits() as waits:
        train_step(training, batch)
    return dict(waits.places)


def pretend(monkeypatch):
    """CPU tensors lie on a device, in every room that asks."""
    monkeypatch.setattr("vlp.pairwise.reduction.on_device", lambda tensor: True)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_waits_for_nothing(monkeypatch, name):
    pretend(monkeypatch)
    assert waits_of(OBJECTIVES[name], micro_batches=2) == {}


def on_rank():
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch)
        return waits_of({"infonce": {}, "sogclr": MOVING}, micro_batches=2)


def test_two_ranks_wait_for_nothing():
    assert ranks.run(2, on_rank) == [{}, {}]


def asks(kind):
    value = torch.arange(4.0)
    questions = {
        "item": lambda: value[0].item(),
        "bool": lambda: bool(value[0] > 0),
        "float": lambda: float(value[0]),
        "nonzero": lambda: value.nonzero(),
        "unique": lambda: value.unique(),
        "mask": lambda: value[value > 1],
        "put by mask": lambda: value.__setitem__(value > 1, torch.zeros(2)),
        "tolist": lambda: value.tolist(),
        "cpu": lambda: value.cpu(),
        "sent": lambda: torch.tensor(4.0, device=value.device),
        "index": lambda: value[torch.tensor([0, 1])],
        "where": lambda: torch.where(value > 1, value, 0),
    }
    return questions[kind]


@pytest.mark.parametrize(
    "kind",
    ["item", "bool", "float", "nonzero", "unique", "mask", "put by mask", "tolist", "cpu", "sent"],
)
def test_each_kind_of_wait_is_counted(monkeypatch, kind):
    """Negative control of the counter; that they stand in a test counts as ours here."""
    monkeypatch.setattr("tests.host_waits._in_package", lambda filename: __file__ in filename)
    with HostWaits() as waits:
        asks(kind)()
    assert sum(waits.places.values()) >= 1
    with HostWaits() as none:
        asks("index")()
        asks("where")()
    assert not none.places


def numbers_reduced():
    """How many numbers each all-reduce of a step carries, gradients of the towers aside."""
    training = make_training(2, objective={"infonce": {}}, double=False)
    sizes, reduce = [], dist.all_reduce
    train_step(training, make_batch(own_rows()))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            dist,
            "all_reduce",
            lambda value, group: sizes.append(value.numel()) or reduce(value, group),
        )
        train_step(training, make_batch(own_rows()))
    return sizes


def test_a_step_has_one_all_reduce_of_its_own():
    """Two numbers' gradients (scale and bias), and whether anything is bad, stop and void."""
    assert ranks.run(2, numbers_reduced) == [[5], [5]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_twenty_steps_on_a_card_synchronise_nothing(name):
    objective = OBJECTIVES[name]
    training = make_training(2, objective=objective, double=False, clip_norm=1.0, device="cuda")
    make = negatives_batch if "hard_negatives" in objective else make_batch
    if "self_distillation" in objective:
        model = training.engine.evaluation_model()
        options = config.Teacher(ema=0.9)
        training.teacher = Teacher(options, training.engine, model, training.objective.needs, {})
    batch = make().pin_memory()
    for _ in range(2):
        train_step(training, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            train_step(training, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
