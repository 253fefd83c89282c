"""Weights of other trainers: they go on where these stopped; what no shape tells is found."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch

from tests.models.tiny import inputs, tiny
from vlp import checkpoint, losses
from vlp.resume import start_from

QUICK = {"quick_gelu": True}


def architecture(folder, quick=False):
    """A small open_clip model by its description, as a file of one's own."""
    config = {key: v for key, v in tiny().open_clip_config.items() if key != "custom_text"}
    path = folder / "own.json"
    path.write_text(json.dumps(config | {"quick_gelu": quick}))
    return path


def trained(path, config, batch):
    """A step of open_clip's model by its loss, saved as its trainer saves an epoch; the loss of the
    weights that were saved.
    """
    torch.manual_seed(3)
    model = open_clip.CLIP(**{k: v for k, v in config.items() if k != "custom_text"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    contrastive = open_clip.ClipLoss()
    for _ in range(2):
        loss = contrastive(*model(*batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = contrastive(*model(*batch)).item()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {
            "epoch": 1,
            "name": "mine",
            "state_dict": state,
            "optimizer": optimizer.state_dict(),
            "scaler": {"scale": 65536.0},
        },
        path,
    )
    return after


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("way", ["pretrained", "init_from"])
def test_a_run_goes_on_at_the_loss_of_open_clips_trainer(way, quick, tmp_path):
    own = architecture(tmp_path, quick)
    config = json.loads(own.read_text())
    plain = tiny()
    pixels, ids = inputs(plain, rows=6)
    batch = (plain.pixels(pixels), ids)
    expected = trained(tmp_path / "epoch_1.pt", config, batch)

    tower = {"name": "open_clip", "architecture": str(own)}
    keys = {"image_tower": tower, "text_tower": None, "embed_dim": None}
    for reference in (str(tmp_path / "epoch_1.pt"), f"{own}:{tmp_path / 'epoch_1.pt'}"):
        if way == "pretrained":
            model = tiny(**keys, pretrained=reference)
        else:
            model = tiny(seed=1, **keys)
            start_from(model, reference)
        with torch.no_grad():
            features = model.train()(pixels, ids)
        total, *_ = losses.build({"infonce": {}})(
            image=features.image, text=features.text, scale=features.scale
        )
        assert abs(float(total) - expected) <= 1e-6


def save_bare(path, more=None):
    weights = {
        name.removeprefix("text."): value for name, value in tiny().open_clip_state_dict().items()
    }
    torch.save(weights | (more or {}), path)
    return str(path)


def test_openais_own_files_are_known_by_their_marks(tmp_path):
    marks = {name: torch.tensor(32) for name in ("input_resolution", "context_length")}
    path = save_bare(tmp_path / "ViT.pt", marks)
    message = "of OpenAI .* were trained with quick GELU, and this model has GELU; set quick_gelu"
    with pytest.raises(ValueError, match=message):
        tiny(pretrained=path)
    with pytest.raises(ValueError, match=message):
        start_from(tiny(), path)
    quick = {"image_tower": tiny_tower("image") | QUICK, "text_tower": tiny_tower("text") | QUICK}
    assert tiny(**quick, pretrained=path)


def tiny_tower(side):
    from tests.models.tiny import TEXT, VIT

    return VIT if side == "image" else TEXT


def test_weights_alone_say_that_they_are_taken_for_the_models_activation(tmp_path, capsys):
    path = save_bare(tmp_path / "weights.pt")
    for load in (lambda: tiny(pretrained=path), lambda: start_from(tiny(), path)):
        load()
        assert "does not say its activation; it is taken to be GELU" in capsys.readouterr().out


def test_what_open_clips_trainer_noted_is_compared(tmp_path):
    logs = tmp_path / "run"
    (logs / "checkpoints").mkdir(parents=True)
    path = save_bare(logs / "checkpoints/epoch_3.pt")
    (logs / "params.txt").write_text("force_quick_gelu: True\nmodel: ViT-B-32\n")
    for load in (lambda: tiny(pretrained=path), lambda: start_from(tiny(), path)):
        with pytest.raises(ValueError, match="trained with quick GELU, and this model has GELU"):
            load()
    with pytest.raises(ValueError, match=r"write ViT-B-32-quickgelu:.*epoch_3\.pt"):
        checkpoint.load_any(path)
    (logs / "params.txt").write_text("force_quick_gelu: False\nmodel: ViT-B-32\n")
    assert tiny(pretrained=path)
