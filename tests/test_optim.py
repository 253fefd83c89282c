"""Durations that could never matter are refused before a run starts."""

import pytest
import torch
from torch import nn

from vlp import config, optim
from vlp.config import Duration, Optimizer, Plan
from vlp.losses import build
from vlp.train import train

PLAN = Plan(batch=32, steps_per_epoch=10, total=50)


@pytest.mark.parametrize(
    "warmup, steps",
    [("50", 50), ("5%", 2), ("100%", 50), ("5ep", 50), ("1600samples", 50), ("0", 0)],
)
def test_a_warmup_within_the_run(warmup, steps):
    options = Optimizer(warmup=Duration.from_config(warmup))
    assert optim.warmup_steps(options, PLAN) == steps
    if steps:
        rate = optim.Schedule(options, PLAN)
        reached = max(rate(step) for step in range(PLAN.total))
        assert reached == options.lr


@pytest.mark.parametrize(
    "warmup, found", [("51", "51"), ("10000", "10,000"), ("6ep", "60"), ("2ksamples", "62")]
)
def test_a_warmup_longer_than_the_run_is_refused_with_both_numbers(warmup, found):
    with pytest.raises(
        ValueError,
        match=f"train.optimizer.warmup is {found} steps, but the run has 50: .*warmup=5%",
    ):
        optim.warmup_steps(Optimizer(warmup=Duration.from_config(warmup)), PLAN)


def test_a_run_with_such_a_warmup_does_not_start(scenes, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"out: {tmp_path / 'run'}\n"
        f"data: {{sources: [{{name: shards, path: {scenes / 'train'}}}], workers: 0}}\n"
        "model:\n"
        "  image_tower:\n"
        "    {name: vit, image_size: 16, patch_size: 8, width: 16, layers: 1, head_width: 16}\n"
        "  text_tower: {name: transformer, context_length: 16, width: 16, layers: 1, heads: 2}\n"
        "  embed_dim: 16\n"
        "train: {duration: 5, batch: 32, precision: float32, optimizer: {warmup: 10000}}\n"
        "objective: {infonce: {}}\n"
    )

    with pytest.raises(ValueError, match="warmup is 10,000 steps, but the run has 5"):
        train(config.load(path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "objective, message",
    [
        (
            {"infonce": {"weight": {"start": 1, "end": 0.5, "steps": 101}}},
            "objective.infonce.weight moves over 101 steps, but the run has 100: "
            r"it would never reach 0\.5",
        ),
        ({"fastclip": {"gamma_steps": 200}}, "gamma_steps is 200, but the run has 100 steps"),
    ],
)
def test_schedules_longer_than_the_run_are_refused(objective, message):
    build(objective)
    build(objective, steps=200)

    with pytest.raises(ValueError, match=message):
        build(objective, steps=100)


def test_decay_covers_matrices_only():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decayed, plain = optim.groups(model, Optimizer(weight_decay=0.1))

    assert decayed["params"] == [model[0].weight] and len(plain["params"]) == 3
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert isinstance(optim.build(model, Optimizer()), torch.optim.AdamW)
