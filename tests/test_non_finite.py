"""NaN and infinity never reach a weight, a moment, a statistic or a state, on any engine and from
wherever they come.
"""

from dataclasses import replace

import pytest
import torch

from tests import ranks
from tests.test_step import make_batch, make_training, own_rows
from vlp import config, dist, engines, losses, plugin
from vlp.models.build import build
from vlp.models.dual_encoder import DualEncoder
from vlp.non_finite import NonFiniteError
from vlp.step import Training, settle, train_step
from vlp.teacher import Teacher

OBJECTIVE = {"infonce": {}, "sogclr": {"samples": 12}}


def poison_embedding(model: DualEncoder, value: float) -> None:
    def hook(_, __, out):
        return out._replace(image=out.image.clone().index_fill_(0, torch.tensor([1]), value))

    model.register_forward_hook(hook)


def poison_gradient(model: DualEncoder, value: float) -> None:
    """One entry of a gradient in the image tower, after embeddings and loss were found finite."""
    convolution = next(m for name, m in model.named_modules() if name.endswith("conv1"))

    def in_backward(gradient):
        return gradient.flatten().index_fill(0, torch.tensor([3]), value).view_as(gradient)

    convolution.register_forward_hook(lambda _, __, out: out.register_hook(in_backward) and None)


PLACES = {"embedding": poison_embedding, "gradient": poison_gradient}


def everything(training):
    """Weights, moments and state of the objective, as lists."""
    model, moments = training.engine.state(everywhere=True)
    tables = {name: state["samples"].whole() for name, state in training.objective.state.items()}
    named = {**model, **moments, **tables}
    return {name: value.double().flatten().tolist() for name, value in named.items()}


def attempt(engine, place, value, may_skip, guilty_rank=0):
    """One good step, one poisoned; the message, and whether anything moved in the second."""
    training = make_training(engine=engine, double=False, clip_norm=1.0, objective=OBJECTIVE)
    training.may_skip = may_skip
    batch = make_batch(own_rows())
    train_step(training, batch)
    before = everything(training)
    assert all(
        torch.tensor(values).isfinite().all() for name, values in before.items() if name != "sogclr"
    )

    if dist.rank() == guilty_rank:
        PLACES[place](training.engine.module, value)
    message = ""
    try:
        train_step(training, batch)
        settle(training)
        assert training.skipped == 1
    except NonFiniteError as error:
        message = str(error)
    return message, everything(training) == before, training.step


SLOW = [
    pytest.param(engine, place, marks=pytest.mark.slow)
    for engine in ("zero1", "zero3")
    for place in PLACES
] + [pytest.param(engine, "embedding", marks=pytest.mark.slow) for engine in ("fsdp2", "zero2")]


@pytest.mark.parametrize(
    ("engine", "place"),
    [
        pytest.param("ddp", "embedding", marks=pytest.mark.slow),
        ("ddp", "gradient"),
        ("fsdp2", "gradient"),
        pytest.param("zero2", "gradient", marks=pytest.mark.slow),
        *SLOW,
    ],
)
def test_nothing_moves_on_two_ranks(engine, place):
    n_compared = 0
    for value in (float("nan"), float("inf")):
        for message, unchanged, step in ranks.run(2, attempt, engine, place, value, 5, 1):
            assert (message, unchanged, step) == ("", True, 2)
            n_compared += 1
    assert n_compared == 4


def test_the_good_step_moved_everything():
    """Negative control: with a finite value in the same place weights, moments and state move."""
    training = make_training(double=False, objective=OBJECTIVE)
    train_step(training, make_batch())
    before = everything(training)
    poison_gradient(training.engine.module, 1e-3)
    train_step(training, make_batch())
    after = everything(training)
    assert before.keys() == after.keys()
    still = {name for name in after if after[name] == before[name]}
    constants = {
        "scaling.logit_bias",
        "exp_avg.scaling.logit_bias",
        "exp_avg_sq.scaling.logit_bias",
    }
    assert {name for name in still - constants if not name.endswith(("mean", "std"))} == set()


def trained_resnet(value):
    """A step that a ResNet leaves out: its buffers before and after, and how far an ordinary step
    moves them.
    """
    model = config.Model(
        image_tower=plugin.Named("vlp.towers").parse(
            {"name": "timm", "model": "resnet10t", "image_size": 32}, (), []
        ),
        text_tower=plugin.Named("vlp.towers").parse(
            {"name": "transformer", "width": 32, "layers": 1, "heads": 2, "context_length": 77},
            (),
            [],
        ),
        embed_dim=16,
    )
    options = config.Train(config.Duration(4, "steps"), batch=12, device="cpu", precision="float32")
    torch.manual_seed(0)
    engine = engines.start(options)
    engine.prepare(build(model), options)
    training = Training(engine, losses.build({"infonce": {}}), lambda step: 1e-3, may_skip=1)
    batch = make_batch()
    batch = replace(batch, image=batch.image.repeat_interleave(2, 2).repeat_interleave(2, 3))
    if value is not None:
        poison_embedding(engine.module, value)
    before = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    train_step(training, batch)
    return before, dict(engine.module.named_buffers())


def test_batch_norm_keeps_its_statistics():
    before, after = trained_resnet(float("nan"))
    assert len(before) > 20 and all(torch.equal(before[name], after[name]) for name in before)
    before, after = trained_resnet(None)  # negative control
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 20


def test_the_message_names_samples_and_the_budget_ends_the_run(capsys):
    training = make_training(double=False)
    training.may_skip = 2
    poison_embedding(training.engine.module, float("inf"))
    for _ in range(3):
        train_step(training, make_batch())
    # The last step's answer is still on its way.
    assert capsys.readouterr().err.count("image embedding (image tower) of sample 1 (key1)") == 2
    assert training.skipped == 2
    message = r"(?s)step 2; nothing was updated.*sample 1 \(key1\).*2 such steps.*max_skipped"
    with pytest.raises(NonFiniteError, match=message):
        settle(training)
    assert training.skipped == 3
    assert training.verdict is None


def voided():
    """A good step, and one in which rank 1 has no rows and was asked to stop."""
    training = make_training(double=False, objective=OBJECTIVE)
    batch = make_batch(own_rows())
    train_step(training, batch)
    before = everything(training)
    alone = dist.rank() == 1
    train_step(training, batch, stop=alone, void=alone)
    settle(training)
    unchanged = everything(training) == before
    return unchanged, training.step, training.skipped, training.asked_to_stop


def test_a_step_without_rows_of_one_rank_is_none_and_all_learn_that_it_stops():
    assert ranks.run(2, voided) == [(True, 1, 0, True)] * 2


def test_the_next_step_reads_the_verdict_of_the_one_before():
    training = make_training(double=False)
    poison_embedding(training.engine.module, float("nan"))
    train_step(training, make_batch())
    with pytest.raises(NonFiniteError, match=r"(?s)at step 0;.*sample 1 \(key1\)"):
        train_step(training, make_batch())


def test_an_overflow_in_the_towers_is_named_as_one():
    training = make_training(double=False)
    poison_gradient(training.engine.module, float("inf"))
    train_step(training, make_batch())
    with pytest.raises(NonFiniteError, match=r"no embedding: an overflow .* in the towers"):
        settle(training)


def test_the_teacher_and_its_queue_stand_still():
    training = make_training(double=False, objective={"infonce": {}, "momentum_queue": {}})
    training.may_skip = 1
    options = config.Teacher(ema=0.5, queue=24)
    training.teacher = Teacher(
        options, training.engine, training.engine.module, training.objective.needs, {}
    )
    train_step(training, make_batch())
    before = {name: value.clone() for name, value in training.teacher.state().items()}
    assert before["queue_image"].any()
    poison_gradient(training.engine.module, float("nan"))
    train_step(training, make_batch())
    settle(training)
    after = training.teacher.state()
    assert training.skipped == 1 and all(torch.equal(before[name], after[name]) for name in before)
