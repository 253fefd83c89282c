"""Terms over several modalities under every engine: with a moving average beside the model, with
samples that lack modalities, and on the rows that jest chooses, two ranks equal one process.
"""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest
import torch

from tests import ranks
from tests.models.tiny import few_words
from tests.test_modalities import ALL, HEADS, with_modalities
from tests.test_step import assert_close, make_training, own_rows
from vlp import config
from vlp.models.build import from_description
from vlp.selection.jest import Chooser, Options
from vlp.step import train_step
from vlp.teacher import Teacher

OBJECTIVE = ALL | {"self_distillation": {}}
LENGTH, END = 10, 499  # of texts, and the last of a vocabulary of 500
# Of the step's norm, each term, and the part of the samples that has all modalities.
LOGGED = ("loss", "grad_norm", "gram.complete", *OBJECTIVE)


def batch_of_rank():
    """Samples of few words: ranks send all weights to one another."""
    batch = with_modalities(own_rows())
    return dataclasses.replace(batch, text=batch.text[:, :LENGTH].clamp(max=END))


def trained(text_tower, engine="ddp", micro_batches=1, selects=False):
    """Two steps' scalars, the weights, and those of the moving average."""
    # DeepSpeed looks for ninja.
    os.environ["PATH"] = os.path.dirname(os.sys.executable) + os.pathsep + os.environ["PATH"]
    training = make_training(
        micro_batches,
        engine=engine,
        double=False,
        heads=HEADS,
        objective=OBJECTIVE,
        text_tower=text_tower,
    )
    model = from_description(training.engine.module.description())
    needs = training.objective.needs
    training.teacher = Teacher(config.Teacher(ema=0.5), training.engine, model, needs, {})
    choose = chooser(model)

    scalars = []
    for _ in range(2):
        batch = batch_of_rank()
        if selects:
            batch, of_choice = choose(training, batch)
            scalars.append(of_choice["jest.learnability_chosen"].item())
        of_step = train_step(training, batch)
        scalars += [torch.as_tensor(of_step[name]).item() for name in LOGGED]

    weights, _ = training.engine.state(everywhere=True)
    average = dict(training.teacher.tensors())
    return scalars, as_lists(weights), as_lists(average)


def chooser(model) -> Chooser:
    """By a reference of other weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Chooser(Options(reference="another", keep=0.5, chunks=2), model.eval())


def as_lists(tensors):
    whole = {}
    for name, value in tensors.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        value = value.detach().float().flatten()
        if name.endswith("in_proj_bias"):
            # The keys' have no gradient but rounding, of which AdamW makes a whole step.
            query, _, values = value.chunk(3)
            value = torch.cat([query, values])
        whole[name] = value.tolist()
    return whole


def check(results, expected):
    """The mean over ranks of scalars, and all weights, to float32's precision."""
    scalars, weights, average = expected
    means = torch.tensor([result[0] for result in results], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(scalars).double(), rtol=1e-4, atol=1e-5)
    for result in results:
        for own, wanted in ((result[1], weights), (result[2], average)):
            whole = torch.tensor([x for values in wanted.values() for x in values]).norm()
            assert assert_close(own, wanted, 1e-4, 1e-5 * whole) > 60


SLOW = [
    (engine, *case)
    for engine, case in itertools.product(
        ("ddp", "fsdp2", "zero1", "zero2", "zero3"), ((1, False), (3, False), (3, True))
    )
]
FAST = ("fsdp2", 3, True)
SLOW.remove(FAST)


@pytest.mark.parametrize(
    "engine, micro_batches, selects",
    [FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_two_ranks_equal_one_process(engine, micro_batches, selects, tmp_path):
    text_tower = few_words(tmp_path, END + 1, LENGTH, layers=2)
    expected = trained(text_tower, "ddp", 1, selects)
    check(ranks.run(2, trained, text_tower, engine, micro_batches, selects), expected)
