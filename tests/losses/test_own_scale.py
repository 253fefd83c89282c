"""Objectives with a temperature of their own: which scale a model is exported with."""

import json

import pytest
import yaml

from vlp import losses, plugin
from vlp.assembly import initial_model
from vlp.checkpoint import load_any
from vlp.export.card import of_scale, own_scale
from vlp.export.folder import export

# Of each term with a temperature of its own: its options, and the scale its docstring names.
OWN = {
    "sogclr": ({"temperature": 0.04}, 25),
    "isogclr": ({"temperature": 0.05}, 20),
    "macl": ({"temperature": 0.2, "alpha": 0.5}, 5),
    "mann_whitney": ({"tau": 0.02}, 50),
    "mixup": ({"temperature": 0.125}, 8),
    "momentum_queue": ({"temperature": 0.08}, 12.5),
}


def test_every_term_with_a_temperature_of_its_own_is_named_here():
    with_scale = {
        name
        for name in plugin.names("vlp.losses")
        if hasattr(plugin.load("vlp.losses", name), "exported_scale")
    }
    assert with_scale == OWN.keys()


@pytest.mark.parametrize("name", OWN)
def test_the_exported_scale_is_the_documented_one(name, settings):
    options, scale = OWN[name]
    objective = {"uniformity": {}, name: options}
    config = settings(f"objective={yaml.safe_dump(objective, default_flow_style=True).strip()}")
    model = initial_model(config)
    assert model.open_clip_state_dict()["logit_scale"].exp().item() == pytest.approx(scale)

    said = of_scale({"objective": objective})
    assert f"`{name}`, {scale:.4g}" in said and "not learned" in said

    # Beside a term that learns the scale it is the model's own.
    both = objective | {"infonce": {}}
    assert losses.own_scale(plugin.keyed("vlp.losses", both)) is None
    assert of_scale({"objective": both}) == ""


def test_an_export_says_in_its_description_whose_scale_it_has(settings, tmp_path):
    objective = {"sogclr": OWN["sogclr"][0]}
    model = initial_model(settings(f"objective={yaml.safe_dump(objective).strip()}")).eval()
    export(model, tmp_path / "out", training={"objective": objective})

    described = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert described["vlp"]["own_scale"] == {"term": "sogclr", "scale": 25.0}
    assert load_any(str(tmp_path / "out"))().scale.item() == pytest.approx(25)
    assert own_scale({"objective": {"infonce": {}}}) is None


def test_a_scale_above_the_bound_is_the_bound(settings):
    model = initial_model(settings("objective={sogclr: {temperature: 0.001}}"))
    assert model().scale.item() == pytest.approx(100)
