"""Fine-tuning whole runs: adapters resume bit for bit and start from published weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.test_step import assert_close, gradients_and_weights
from vlp import checkpoint
from vlp.train import train


def losses(run):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def test_a_run_with_adapters_starts_from_weights_and_resumes_bit_for_bit(settings):
    first = train(settings("train.duration=3", out="first"))
    adapted = (
        f"init_from={first}",
        "model.image_tower.lora={r: 2, dropout: 0.1}",
        "model.text_tower.lora={r: 2}",
        "train.duration=5",
        "checkpoint.every=3",
        "data.workers=0",
    )
    whole = train(settings(*adapted, out="whole"))
    assert losses(whole).keys() == {1, 2, 3, 4, 5}
    shutil.copytree(whole, whole.parent / "cut")
    shutil.rmtree(whole.parent / "cut/checkpoints/step_00000005")
    again = train(settings(*adapted, "resume=auto", out="cut"))
    assert losses(again) == losses(whole)
    one, other = (checkpoint.load(checkpoint.newest(run)) for run in (whole, again))
    assert all(one.model[name].equal(other.model[name]) for name in one.model)
    assert one.optimizer and all("lora" in n or "scal" in n for n in one.optimizer)

    # The base is what it started from; merged, the weights have moved.
    start = checkpoint.load_model(first).state_dict()
    base = {
        name.replace(".base_layer.", ".").replace("attn.in_proj.", "attn.in_proj_"): value
        for name, value in one.model.items()
        if "lora" not in name
    }
    towers = [name for name in start if name.startswith(("visual.", "text."))]
    assert len(towers) > 20 and all(torch.equal(start[name], base[name]) for name in towers)
    moved = checkpoint.load_model(whole).state_dict()
    assert not all(torch.equal(start[name], moved[name]) for name in towers)


def test_adapters_learn_through_stages_and_a_run_stopped_at_the_joint_goes_on(settings):
    """Over a joint where pictures grow, the base keeps every bit but its positions."""
    staged = (
        "model.image_tower.lora={r: 2}",
        "train.duration=4",
        "stages=[{duration: 2, image_size: 8, batch: 24}]",
        "checkpoint={every: 1, keep: 9}",
        "data.workers=0",
    )
    whole = train(settings(*staged, out="whole"))
    assert losses(whole).keys() == {1, 2, 3, 4}
    cut = whole.parent / "cut"
    shutil.copytree(whole, cut)
    for later in (3, 4):
        shutil.rmtree(cut / f"checkpoints/step_{later:08d}")
    assert losses(train(settings(*staged, "resume=auto", out=cut.name))) == losses(whole)

    first, last = (checkpoint.load(whole / f"checkpoints/step_{step:08d}").model for step in (1, 4))
    base = {name for name in last if name.startswith("visual.") and "lora" not in name}
    moved = {name for name in base if not torch.equal(last[name], first[name])}
    assert len(base) > 10 and moved == {"visual.positional_embedding"}
    learned = [name for name in last if "lora_B" in name]
    assert len(learned) == 4
    assert all(last[name].any() and not last[name].equal(first[name]) for name in learned)


TUNED = {
    "image": {"lora": {"r": 2, "alpha": 8.0}},
    "text": {"locked": {"unlocked_groups": 2}},
}


def tuned(micro_batches, engine, double):
    return gradients_and_weights(micro_batches, engine=engine, double=double, towers=TUNED)


@pytest.mark.parametrize(
    "engine",
    [
        "fsdp2",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.slow),
    ],
)
def test_adapters_and_locked_layers_are_the_same_under_every_engine(engine):
    """Two ranks, each with frozen and trained parameters in one block; what is frozen keeps every
    bit.
    """
    exact = not engine.startswith("zero")
    one = tuned(1, "ddp", exact)
    for gradients, weights, _ in ranks.run(2, tuned, 3, engine, exact):
        tolerance = 1e-9 if exact else 1e-4
        n_trained = assert_close(gradients, one[0], tolerance, 1e-12 if exact else 1e-6)
        assert 20 < n_trained < len(weights) / 2
        frozen = weights.keys() - gradients.keys()
        assert len(frozen) > 20 and all(weights[name] == one[1][name] for name in frozen)
        if exact:
            assert_close(weights, one[1], tolerance)
