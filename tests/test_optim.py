"""Optimisers by name, groups, layers and schedules; what could never matter is refused before a run
starts.
"""

import math

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from tests.models.tiny import tiny
from vlp import config, optim, schema
from vlp.config import Duration, Optimizer, Plan
from vlp.losses import build
from vlp.optim.layers import layer_ids
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


def by_hand(schedule, step, warmup, total, final, cooldown, form, timescale):
    """The rate of one step for lr = 1, as the formulas have it."""
    if step < warmup:
        return (step + 1) / warmup
    after = step - warmup
    if schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * after / (total - warmup))) / 2

    rate = 1 / math.sqrt(1 + after / timescale) if schedule == "inverse_sqrt" else 1.0
    if cooldown and step >= total - cooldown:
        share = (step - (total - cooldown)) / cooldown
        falling = 1 - math.sqrt(share) if form == "1-sqrt" else 1 - share
        rate *= final + (1 - final) * falling
    return rate


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("schedule", "cooldown", "form", "final"),
    [
        ("cosine", 0, "linear", 0.0),
        ("cosine", 0, "linear", 0.1),
        ("constant", 0, "linear", 0.0),
        ("constant", 7, "linear", 0.2),
        ("wsd", 10, "linear", 0.0),
        ("wsd", 10, "1-sqrt", 0.1),
        ("wsd", 1, "1-sqrt", 0.0),
        ("inverse_sqrt", 0, "linear", 0.0),
        ("inverse_sqrt", 20, "linear", 0.0),
    ],
)
def test_a_schedule_is_its_formula(schedule, cooldown, form, final, warmup):
    options = Optimizer(
        lr=1.0,
        schedule=schedule,
        warmup=Duration(warmup, "steps"),
        cooldown=Duration(cooldown, "steps") if cooldown else None,
        cooldown_form=form,
        final_lr=final,
    )
    rate = optim.Schedule(options, PLAN)
    timescale = warmup or 10_000
    rates = [rate(step) for step in range(PLAN.total)]
    expected = [
        by_hand(schedule, step, warmup, PLAN.total, final, cooldown, form, timescale)
        for step in range(PLAN.total)
    ]
    assert rates == pytest.approx(expected, rel=1e-12) and len(rates) == 50

    # It starts to fall from where it was: no jump upwards, and the peak is lr.
    assert max(rates) == pytest.approx(1.0)
    assert all(b <= a for a, b in zip(rates[warmup:], rates[warmup + 1 :]))


def test_wsd_cools_down_over_a_fifth_and_says_so():
    options = Optimizer(schedule="wsd")
    assert options.cooldown == Duration(20, "%")
    rate = optim.Schedule(options, PLAN)
    assert rate(40) == options.lr > rate(41)


def test_inverse_sqrt_has_fallen_by_root_two_after_its_timescale():
    options = Optimizer(
        schedule="inverse_sqrt", timescale=Duration(8, "steps"), warmup=Duration(2, "steps")
    )
    rate = optim.Schedule(options, PLAN)
    assert rate(10) == pytest.approx(options.lr / math.sqrt(2))


def falling(step, warmup, total):
    return 1 - step / total


def spoilt(step, warmup, total):
    return None if step == total - 1 else 1.0


def test_a_function_of_ones_own_is_the_whole_schedule():
    rate = optim.Schedule(Optimizer(lr=2.0, schedule=f"{__name__}:falling"), PLAN)
    assert [rate(0), rate(25)] == [2.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (f"{__name__}:spoilt", "gives None for step 49, warmup 2, total 50"),
        (f"{__name__}:nothing", "has no attribute 'nothing'"),
        ("no_such_module:rate", "No module named 'no_such_module'"),
        (f"{__name__}:PLAN", "is no function"),
    ],
)
def test_a_function_that_gives_no_factor_is_refused_at_the_start(schedule, message):
    with pytest.raises(ValueError, match=message):
        optim.Schedule(Optimizer(schedule=schedule), PLAN)


def test_a_cooldown_that_begins_before_the_warmup_ends_is_refused():
    options = Optimizer(schedule="wsd", cooldown=Duration(90, "%"), warmup=Duration(10, "steps"))
    with pytest.raises(ValueError, match="cooldown is 45 steps and warmup 10, but the run has 50"):
        optim.Schedule(options, PLAN)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"cooldown": "5%"}, "cooldown is 5%, which the schedule cosine does not read"),
        ({"timescale": 5}, "timescale is 5, which the schedule cosine does not read"),
        ({"schedule": "constant", "final_lr": 0.1}, "final_lr is 0.1, which the schedule constant"),
        ({"layer_decay": 1.5}, r"layer_decay is 1.5; expected a factor in \(0, 1\]"),
        ({"layer_decay": {"image": 0.0}}, "layer_decay is 0.0"),
        ({"groups": [{}]}, "groups.0: a group needs a tower, a pattern, or both"),
        ({"groups": [{"tower": "image", "lr": 0}]}, "lr 0.0 and weight_decay 1.0 are factors"),
        ({"groups": [{"pattern": "("}]}, "is no regular expression"),
    ],
)
def test_keys_that_mean_nothing_are_refused(keys, message):
    with pytest.raises(schema.ConfigError, match=message):
        schema.parse(Optimizer, keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Optimizer(name="lyon"), "no optimiser 'lyon', did you mean 'lion'"),
        (Optimizer(name="adahessian"), "adahessian .* does not run here: it needs second deriv"),
        (Optimizer(name="bnblion"), "the package bitsandbytes's"),
        (Optimizer(name="kron"), "kron .* draws random numbers of its own"),
        (Optimizer(name="lion", options={"gamma": 1}), "lion takes no 'gamma'; it takes betas,"),
        (Optimizer(name="lion", eps=1e-6), "train.optimizer.eps: lion takes none; set it to null"),
        (Optimizer(name="sgd", betas=(0.9, 0.95)), "train.optimizer.betas: sgd takes none"),
        (Optimizer(options={"lr": 1}), "write train.optimizer.lr instead"),
        (Optimizer(options={"fused": False}), "adamw takes no 'fused'"),
    ],
)
def test_an_optimiser_that_does_not_run_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        optim.check(options)


def test_options_that_the_optimiser_itself_refuses_are_named():
    with pytest.raises(ValueError, match=r"lion does not run with options {'betas': 'x'}"):
        optim.trial(Optimizer(name="lion", options={"betas": "x"}))


def test_what_reads_whole_tensors_is_found_by_trying():
    elementwise = ("adamw", "lion", "sgd", "nadamw", "adopt", "radam", "adanw", "laprop")
    of_wholes = ("muon", "lamb", "lambcw", "lars", "adamp", "sgdp", "adafactor", "cadamw", "mars")
    for name in elementwise:
        assert optim.trial(Optimizer(name=name)).elementwise, name
    for name in of_wholes:
        assert not optim.trial(Optimizer(name=name)).elementwise, name

    # By its options, too.
    assert not optim.trial(Optimizer(name="lion", options={"caution": True})).elementwise
    assert optim.trial(Optimizer(name="adan")).counters == {"step"}
    assert optim.trial(Optimizer(name="lookahead_lion")).counters == {"lookahead_step"}


GROUPS = [
    {"pattern": r"ln_\w+\.weight", "lr": 0.5},
    {"tower": "image", "lr": 0.1, "weight_decay": 0.5},
    {"pattern": "logit_scale", "lr": 2.0},
]


def settings_by_name(model, options, **keywords):
    """Name → the group's settings; every trainable parameter exactly once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings = {}
    for group in optim.groups(model, options, **keywords):
        for parameter in group["params"]:
            assert names[id(parameter)] not in settings
            settings[names[id(parameter)]] = group
    assert len(settings) == sum(p.requires_grad for p in model.parameters())
    return settings


def test_the_first_group_that_fits_counts():
    model = tiny()
    options = schema.parse(Optimizer, {"weight_decay": 0.2, "groups": GROUPS})
    settings = settings_by_name(model, options)
    factors = {n: (g["lr_factor"], g["weight_decay"]) for n, g in settings.items()}
    assert factors["visual.transformer.resblocks.0.ln_1.weight"] == (0.5, 0.0)
    assert factors["visual.transformer.resblocks.0.attn.in_proj_weight"] == (0.1, 0.1)
    assert factors["visual.transformer.resblocks.0.attn.in_proj_bias"] == (0.1, 0.0)
    assert factors["text.transformer.resblocks.0.attn.in_proj_weight"] == (1.0, 0.2)
    assert factors["scaling.logit_scale"] == (2.0, 0.0)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"pattern": "logit_scales"}], "groups.0 .* fits no parameter; near to it: logit_scale"),
        ([{"tower": "text", "pattern": "conv1"}], "fits no parameter; "),
        ([{"tower": "text"}, {"pattern": r"^text\.ln"}], "groups.1 .* in groups before it"),
        ([{"pattern": "conv1"}], "fits 1 parameters, such as visual.conv1.weight, and none"),
    ],
)
def test_a_group_that_holds_nothing_is_refused(groups, message):
    model = tiny()
    model.visual.conv1.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        optim.groups(model, schema.parse(Optimizer, {"groups": groups}))


def test_muon_updates_the_matrices_of_blocks():
    settings = settings_by_name(tiny(), Optimizer(name="muon"), of_matrices=True)
    by_muon = {name for name, group in settings.items() if "use_fallback" not in group}
    assert by_muon == {
        name for name in settings if "resblocks" in name and settings[name]["weight_decay"]
    }
    assert len(by_muon) == 4 * sum(name.endswith("ln_1.weight") for name in settings)


def towers():
    """Towers of all layouts, with their number of layers, a low and a high parameter."""
    model = tiny()
    yield model.visual, 2, "conv1.weight", "proj"
    yield model.text, 2, "token_embedding.weight", "text_projection"
    resnet = ModifiedResNet([1, 2, 1, 1], 16, heads=2, image_size=32, width=8)
    yield resnet, 5, "bn1.weight", "attnpool.q_proj.weight"
    timm_vit = {"name": "timm", "model": "test_vit", "image_size": 160}
    vit = tiny(image_tower=timm_vit).visual
    yield vit, 6, "trunk.pos_embed", "head.proj.weight"
    timm_resnet = {"name": "timm", "model": "test_resnet", "image_size": 64}
    convolutions = tiny(image_tower=timm_resnet).visual
    yield convolutions, None, "trunk.bn1.weight", "head.proj.weight"
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=9, num_hidden_layers=3, **sizes))
    yield bert, 3, "embeddings.LayerNorm.weight", "pooler.dense.weight"
    llama = LlamaModel(LlamaConfig(vocab_size=9, num_hidden_layers=3, **sizes))
    yield llama, 3, "embed_tokens.weight", "norm.weight"


def test_every_parameter_of_every_tower_lies_in_one_layer():
    n_towers = 0
    for tower, n_layers, low, high in towers():
        ids = layer_ids(tower)
        deepest = max(ids.values())
        assert ids.keys() == {name for name, _ in tower.named_parameters()}
        assert (ids[low], ids[high]) == (0, deepest), (low, high)
        assert set(ids.values()) == set(range(deepest + 1))
        assert n_layers in (None, deepest)
        n_towers += 1
    assert n_towers == 7


def test_layer_decay_by_tower():
    model = tiny()
    options = schema.parse(Optimizer, {"layer_decay": {"image": 0.5}, "groups": GROUPS[1:2]})
    factors = {n: g["lr_factor"] for n, g in settings_by_name(model, options).items()}
    n_blocks = len(model.visual.transformer.resblocks)
    assert factors["visual.conv1.weight"] == pytest.approx(0.1 * 0.5**n_blocks)
    first = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert factors[first] == pytest.approx(0.1 * 0.5 ** (n_blocks - 1))
    assert factors["visual.ln_post.weight"] == factors["visual.proj"] == 0.1
    assert factors["text.token_embedding.weight"] == factors["scaling.logit_scale"] == 1.0
