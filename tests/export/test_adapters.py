"""A run's adapters alone: peft loads them onto the plain towers, and every reference beside their
base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.export.test_cards import run_card
from tests.export.test_places import places
from tests.loopback_hub import TOKEN, loopback_hub
from tests.models.test_locking import towers
from tests.models.test_references import use_hub
from tests.models.tiny import TEXT, VIT, inputs, settings, tiny
from vlp import checkpoint
from vlp.cli import main
from vlp.export.adapters import _card, write_adapters
from vlp.export.folder import export
from vlp.export.place import ExportError
from vlp.export.push import PushError, push
from vlp.models import lora
from vlp.models.build import build, fit_of
from vlp.models.dual_encoder import DualEncoder
from vlp.models.load import load
from vlp.resume import start_from
from vlp.schema import plain

LORA = {"lora": {"r": 3, "alpha": 7.5}}


def embedded(model: Any, batch: tuple) -> tuple:
    with torch.no_grad():
        features = model.eval()(*batch)
    return features.image, features.text


def assert_same(one: tuple, other: tuple) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-6


def save_run(folder: Path, model: DualEncoder, section: dict, **keys: Any) -> Path:
    """A run of which `model` is the checkpoint."""
    text = yaml.safe_dump({"init_from": None, "model": section} | keys)
    description = model.description()
    contents = checkpoint.Contents(model.state_dict(), {}, config=text, description=description)
    checkpoint.save(folder, 3, contents, keep=1)
    return folder


def started(section: Any, base: Path | str) -> DualEncoder:
    """The model of a section with the weights that `init_from` names."""
    return build(section, lambda made: start_from(made, str(base), fit_of(section)))


def tuned(folder: Path, base: Path, **keys: Any) -> tuple[Path, DualEncoder]:
    """A run that started from `base`, and its model once all that learns has moved."""
    section = settings(**keys)
    torch.manual_seed(5)
    model = started(section, base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return save_run(folder, model, plain(section), init_from=str(base)), model.eval()


def with_peft(folder: Path, model: DualEncoder) -> DualEncoder:
    """A plain model of the tuned one's sizes with the rest in place, its towers in peft's hands."""
    rest = load_file(folder / "rest.safetensors")
    state = model.state_dict()
    named = {f"scaling.{n}" if f"scaling.{n}" in state else n: v for n, v in rest.items()}
    model.load_state_dict(state | {n: v.reshape(state[n].shape) for n, v in named.items()})
    for side, name in (("visual", "image"), ("text", "text")):
        if (folder / name).is_dir():
            peft = PeftModel.from_pretrained(model.get_submodule(side), folder / name)
            setattr(model, side, peft.base_model.model)
    return model


BOTH_TOWERS = {"image_tower": VIT | LORA, "text_tower": TEXT | {"lora": {"r": 2}}}
LARGER = {
    "image_tower": VIT | LORA | {"image_size": 48},
    "text_tower": TEXT | LORA | {"context": {"length": 24, "keep": 4}},
}
ONE_PROJECTION = {"lora": {"r": 2, "targets": ["attn.in_proj", "mlp.c_fc"]}}
OTHER_DIM = {"embed_dim": 24, "new_projection": True}


def case(name: str, folder: Path) -> tuple[dict, dict]:
    """The model sections of a base and of what is tuned."""
    kinds = towers(folder)
    timm, language = kinds["timm vit"][1], kinds["huggingface"][1]
    others = {"image_tower": timm, "text_tower": language}
    tuned_others = {"image_tower": timm | LORA, "text_tower": language | LORA}
    return {
        "torch's attention": (
            {"bias": -10.0},
            LARGER | {"image_tower": VIT | ONE_PROJECTION | {"image_size": 48}, "bias": -10.0},
        ),
        "layers of other libraries": (others, tuned_others | OTHER_DIM),
        "both towers": ({}, BOTH_TOWERS),
        "one projection": ({}, {"image_tower": VIT | ONE_PROJECTION}),
        "other sizes": ({"bias": -10.0}, LARGER | {"bias": -10.0}),
        "new projection": ({}, BOTH_TOWERS | OTHER_DIM),
        "timm": ({"image_tower": timm}, {"image_tower": timm | LORA}),
        "hugging face": ({"text_tower": language}, {"text_tower": language | LORA}),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "torch's attention",
        "layers of other libraries",
        # Each of what those two join, by itself.
        pytest.param("both towers", marks=pytest.mark.slow),
        pytest.param("one projection", marks=pytest.mark.slow),
        pytest.param("other sizes", marks=pytest.mark.slow),
        pytest.param("new projection", marks=pytest.mark.slow),
        pytest.param("timm", marks=pytest.mark.slow),
        pytest.param("hugging face", marks=pytest.mark.slow),
    ],
)
def test_peft_and_every_reference_give_the_merged_model(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    base_keys, keys = case(name, tmp_path)
    base = tiny(seed=1, **base_keys)
    reference = save_run(tmp_path / "base", base, plain(settings(**base_keys)))
    run, model = tuned(tmp_path / "run", reference, **keys)
    batch = inputs(model)
    expected = embedded(checkpoint.load_model(run), batch)
    assert_same(expected, embedded(model, batch))

    folder = tmp_path / "adapters"
    assert main(["export", str(run), "--form", "adapters", "--to", str(folder)]) == 0
    assert f"for {reference}" in capsys.readouterr().out
    if name in ("torch's attention", "both towers"):
        whole = (run / "checkpoints/step_00000003/model.safetensors").stat().st_size
        assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < whole / 20
    assert_same(embedded(checkpoint.load_any(folder), batch), expected)

    # By peft, onto towers that know no adapters.
    unadapted = {key: _without_lora(value) for key, value in keys.items()}
    bare = started(settings(**unadapted), reference)
    assert_same(embedded(with_peft(folder, bare), batch), expected)

    # By the keys of a configuration.
    again = unadapted | {"new_projection": False}
    assert_same(embedded(tiny(seed=8, **again, pretrained=str(folder)), batch), expected)
    assert_same(embedded(started(settings(**again), folder), batch), expected)

    moved = embedded(tiny(seed=1, **base_keys), inputs(base))
    assert any(a.shape != b.shape or (a - b).abs().max() > 1e-3 for a, b in zip(moved, expected))


def _without_lora(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key != "lora"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base as an export, a run, and its adapters."""
    place = tmp_path_factory.mktemp("written")
    export(tiny(seed=1), place / "base")
    run, _ = tuned(place / "run", place / "base", image_tower=VIT | LORA)
    write_adapters(run, place / "adapters", license="mit")
    return place / "base", run, place / "adapters"


def test_adapters_of_nonnegative_embeddings_are_read_with_their_last_step(tmp_path: Path) -> None:
    export(tiny(), tmp_path / "base")
    keys = {"image_tower": VIT | ONE_PROJECTION, "heads": {"nonnegative": True}}
    run, model = tuned(tmp_path / "run", tmp_path / "base", **keys)
    write_adapters(run, tmp_path / "adapters")
    batch = inputs(model)
    assert_same(embedded(load(tmp_path / "adapters"), batch), embedded(model, batch))
    assert (embedded(model, batch)[0] >= 0).all()


def test_a_folder_says_what_it_is(written: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, _, folder = written
    card = (folder / "README.md").read_text()
    assert "adapters for `base`" in card and "license: mit" in card
    # Of the base's place on this machine speaks the one file that readers follow.
    assert set(places(folder, base.parent)) == {"vlp_adapters.json"}
    assert not (folder / "text").exists()

    # A whole model of it, as of any other reference.
    assert main(["export", str(folder), "--to", str(tmp_path / "whole")]) == 0
    batch = inputs(tiny())
    merged = checkpoint.load_any(folder)
    assert_same(embedded(checkpoint.load_any(tmp_path / "whole"), batch), embedded(merged, batch))


def test_adapters_and_their_base_are_read_from_a_hub(
    written: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, folder = written
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub() as hub:
        use_hub(monkeypatch, hub.url)

        def publish(folder: Path, repository: str) -> None:
            push(folder, repository, endpoint=hub.url, say=lambda line: None)

        # Whoever downloads them has no folder of this machine.
        with pytest.raises(PushError, match=r"the adapters' base, .*base, is of this machine"):
            publish(folder, "someone/adapters")
        assert "someone/adapters" not in hub.repos
        publish(base, "someone/base")
        publish(changed(folder, tmp_path / "of the hub", base="hf-hub:someone/base"), "someone/a")
        read = checkpoint.load_any("hf-hub:someone/a")

    batch = inputs(tiny())
    assert_same(embedded(read, batch), embedded(checkpoint.load_any(folder), batch))


def test_the_code_of_a_card_of_adapters_runs(
    written: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, folder = written
    training = {"objective": {"isogclr": {"samples": 9}}}
    card = _card('a "b", é', "hf-hub:someone/base", ["image"], "mit", training)
    assert "the term `isogclr`" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "someone/base"
    shutil.copytree(folder, tmp_path / 'a "b", é')
    (tmp_path / 'a "b", é' / "README.md").write_text(card, encoding="utf-8")
    assert run_card(tmp_path / 'a "b", é', monkeypatch) == 1


def changed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of adapters that says something else of itself."""
    shutil.copytree(folder, to)
    about = json.loads((to / "vlp_adapters.json").read_text())
    (to / "vlp_adapters.json").write_text(json.dumps(about | changes))
    return to


def test_a_wrong_base_is_refused_with_what_to_do(
    written: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, _, folder = written
    export(tiny(seed=2), tmp_path / "other")
    export(tiny(seed=2, image_tower=VIT | {"width": 96}), tmp_path / "wider")
    for base, message in (
        (
            "other",
            r"other has other weights than .* was trained on .*; set base in .*adapters.json",
        ),
        ("wider", "do not fit this model"),
        ("gone", "holds adapters for .*gone, which is not found: no model .* Set base in"),
    ):
        wrong = changed(folder, tmp_path / f"for {base}", base=str(tmp_path / base))
        with pytest.raises(ValueError, match=message):
            checkpoint.load_any(wrong)

    itself = changed(folder, tmp_path / "itself", base=str(folder))
    with pytest.raises(ValueError, match="no adapters can be added to"):
        checkpoint.load_any(itself)
    with pytest.raises(ValueError, match="does not say base, digest"):
        checkpoint.load_any(changed(folder, tmp_path / "none", base=3, digest=None))


def test_damaged_adapters_and_those_of_another_kind_are_refused(
    written: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, _, folder = written
    for name, change in (("dora", {"use_dora": True}), ("ia3", {"peft_type": "IA3"})):
        other = changed(folder, tmp_path / name)
        file = other / "image/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ValueError, match="expected plain LORA"):
            checkpoint.load_any(other)

    half = changed(folder, tmp_path / "half")
    file = half / "image/adapter_model.safetensors"
    tensors = load_file(file)
    layer = next(name for name in tensors if "c_fc.lora_B" in name)
    save_file({n: v for n, v in tensors.items() if n != layer}, file)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors holds .*c_fc\.lora_A.* alone"):
        checkpoint.load_any(half)
    save_file(tensors | {layer.replace("lora_B.weight", "bias"): tensors[layer].clone()}, file)
    with pytest.raises(ValueError, match=r"c_fc\.bias, which is no A or B of plain LORA"):
        checkpoint.load_any(half)
    save_file({}, file)
    with pytest.raises(ValueError, match="holds no adapters"):
        checkpoint.load_any(half)

    cut = changed(folder, tmp_path / "cut")
    (cut / "rest.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"rest.safetensors cannot be read .*export the adapters"):
        checkpoint.load_any(cut)

    foreign = changed(folder, tmp_path / "foreign")
    save_file({"visual.no_such": torch.zeros(2)}, foreign / "rest.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors that do not fit this model .visual\.no_such"):
        checkpoint.load_any(foreign)


def test_runs_without_adapters_or_base_are_refused(
    written: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    base, run, folder = written
    adapted = tiny(image_tower=VIT | LORA)
    section = plain(settings(image_tower=VIT | LORA))
    plain_run = save_run(tmp_path / "plain", tiny(), plain(settings()))
    random_run = save_run(tmp_path / "random", adapted, section)
    foreign_run = save_run(tmp_path / "foreign", adapted, section, init_from=str(base))
    for reference, message in (
        (plain_run, "trained no adapters"),
        (random_run, "started from no model that a reference names"),
        (foreign_run, "base has other weights than this run started from"),
        (base, "only a run's own weights keep adapters apart"),
        (f"{run}@ema", "only a run's own weights keep adapters apart"),
    ):
        with pytest.raises(ExportError, match=message):
            write_adapters(reference, tmp_path / "out")
    with pytest.raises(ExportError, match="not empty"):
        write_adapters(run, folder)
    assert not (tmp_path / "out").exists()

    options = ["--form", "adapters", "--onnx", "--dtype", "bf16", "--to", str(tmp_path / "out")]
    assert main(["export", str(run), *options]) == 1
    assert "found 1 and --onnx, --dtype" in capsys.readouterr().err
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vlp\[lora\]'"):
        write_adapters(run, tmp_path / "out")
