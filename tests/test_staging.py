"""What a checkpoint copies of a run while the next step computes."""

import itertools
import threading

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests import ranks
from tests.test_step import make_batch, make_training, own_rows
from vlp import config, dist, plugin
from vlp.engines.replicated import local_part
from vlp.saving import Saver
from vlp.staging import held, named_tensors
from vlp.step import train_step
from vlp.teacher import Teacher

OBJECTIVE = {
    "infonce": {},
    "self_distillation": {},
    "fastclip": {"version": "v2", "samples": 13},
}


def training_with_state_of_every_kind(engine):
    """A moving average, a queue, numbers of each sample, and in one process batch norms."""
    model = None
    if dist.world_size() == 1:  # ranks would take seconds to import timm
        resnet = {"name": "timm", "model": "test_resnet", "image_size": 16}
        text = {"name": "transformer", "width": 32, "layers": 2, "heads": 2, "context_length": 77}
        towers = [plugin.Named("vlp.towers").parse(tower, (), []) for tower in (resnet, text)]
        model = config.Model(image_tower=towers[0], text_tower=towers[1], embed_dim=16)

    training = make_training(engine=engine, objective=OBJECTIVE, double=False, whole=model)
    average = training.engine.evaluation_model()
    options = config.Teacher(ema=0.5, queue=16)
    training.teacher = Teacher(options, training.engine, average, training.objective.needs, {})
    return training


def values_of(training):
    """Copies of this rank's part of all that a checkpoint holds."""
    tensors = dict(named_tensors(training))
    tables = training.objective.tables()
    tensors |= {f"objective/{name}": table.rows()[: table.samples] for name, table in tables}
    return {name: local_part(value.detach()).clone() for name, value in tensors.items()}


def copied_at_the_last_moment(engine, run):
    """Where nothing is copied before the update: (names of what was copied with other values than
    those it was collected with, names of what the step moved, number of tensors compared, number of
    those that were copied late).
    """
    training = training_with_state_of_every_kind(engine)
    train_step(training, make_batch(own_rows()))
    before = values_of(training)

    staging = Saver(run, keep=1).staging
    of_kinds = held(training, staging)
    n_late = len(staging.pending)
    training.before_update = staging.settle
    train_step(training, make_batch(own_rows()))
    after = values_of(training)

    different, n_compared = [], 0
    for kind, tensors in of_kinds.items():
        for name, value in tensors.items():
            full_name = f"{kind}/{name}"
            expected = before[full_name]
            # Of large tensors that every rank holds each writes some rows.
            if isinstance(value, DTensor) and expected.numel() != local_part(value).numel():
                expected = expected.chunk(dist.world_size())[dist.rank()]
            n_compared += 1
            if not torch.equal(local_part(value).reshape(expected.shape), expected):
                different.append(full_name)
    moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
    return different, moved, n_compared, n_late


KINDS_THAT_MOVE = (
    "model/visual.",
    "optimizer/exp_avg.",
    "optimizer/step.",
    "teacher/ema_",
    "objective/fastclip/",
)
STATISTICS = ("running_mean", "num_batches_tracked")


def check_copies(results, kinds_that_move):
    for different, moved, n_compared, n_late in results:
        assert different == []
        assert n_compared >= n_late
        assert not [kind for kind in kinds_that_move if not any(kind in name for name in moved)]
    assert sum(n_late for *_, n_late in results) > 150


def test_a_copy_made_right_before_the_update_is_of_the_step_before(tmp_path):
    """Even of statistics, which a forward pass moves; and all has moved when the step is done."""
    result = copied_at_the_last_moment("ddp", tmp_path)
    check_copies([result], KINDS_THAT_MOVE + STATISTICS)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_so_is_that_of_ranks(engine, tmp_path):
    check_copies(ranks.run(2, copied_at_the_last_moment, engine, tmp_path), KINDS_THAT_MOVE)


def test_an_update_waits_for_the_copy_and_for_nothing_else(tmp_path):
    """Of another thread, which may be late, or fail."""
    training = make_training(double=False)
    saver = Saver(tmp_path, keep=1)
    held(training, saver.staging)
    saver.staging.copied.clear()
    training.before_update = saver.staging.wait

    step = threading.Thread(target=train_step, args=(training, make_batch()))
    step.start()
    step.join(0.3)
    assert step.is_alive() and training.step == 0

    # A copy that fails.
    saver.staging.pending.append((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(RuntimeError):
        saver.staging.settle()
    step.join(20)
    assert not step.is_alive() and training.step == 1


def test_buffers_and_their_places_are_kept_until_the_layout_changes(tmp_path):
    assert ranks.run(2, layouts, tmp_path) == [[True, False, False, True]] * 2


def layouts(run):
    """Whether what is written is the very tensor of the save before, as a tensor grows, changes its
    type, and stays.
    """
    staging = Saver(run, keep=1).staging
    rows = 2**16
    values = [torch.zeros(rows), torch.ones(rows), torch.ones(2 * rows)]
    values += [values[-1].double(), values[-1].double() + 1]
    written = []
    for value in values:
        part = staging.held("model/w", value)
        staging.settle()
        assert torch.equal(part.full_tensor(), value)
        written.append(part)
    return [one is other for one, other in itertools.pairwise(written)]
