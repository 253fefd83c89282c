"""Towers out of installed packages: a run names the package, and finds it where it lies now."""

import importlib
import json
import os

import pytest
import torch

from tests.models.languages import language_model as decoder
from tests.models.tiny import language_model, tiny
from vlp import checkpoint
from vlp.data import text
from vlp.export.folder import export, export_run
from vlp.pretrained import packages

TEXTS = ["two red circles", "a dog"]
NAME = "tiny_language_for_tests"


def install(folder, monkeypatch):
    """A machine's folder of packages, which is imported from."""
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    return folder


def moved(old, new, monkeypatch):
    """The packages lie elsewhere from now on."""
    os.rename(old, new)
    monkeypatch.setattr("sys.path", [place for place in os.sys.path if place != str(old)])
    return install(new, monkeypatch)


def embed(model):
    with torch.no_grad():
        return model(text=text.build(model.text_spec)(TEXTS)).text


def saved(model, run):
    contents = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    checkpoint.save(run, 1, contents, keep=1)
    return run


def contents_of(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


KINDS = {
    "huggingface": (language_model, {"pretrained": False}),
    "llm": (decoder, {"pool": "mean"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_read_where_its_package_lies_elsewhere(kind, tmp_path, monkeypatch):
    write, keys = KINDS[kind]
    old = install(tmp_path / "one/site-packages", monkeypatch)
    write(old / NAME / "model")
    tower = {"name": kind, "model": f"package:{NAME}/model", "context_length": 12} | keys
    model = tiny(text_tower=tower)
    expected = embed(model)
    run = saved(model, tmp_path / "run")
    assert f"package:{NAME}/model".encode() in contents_of(run)
    assert str(tmp_path).encode() not in contents_of(run)

    moved(old, tmp_path / "two", monkeypatch)
    assert torch.equal(embed(checkpoint.load_model(run)), expected)
    export_run(run, tmp_path / "out")
    assert str(tmp_path / "two").encode() not in contents_of(tmp_path / "out")

    # A folder needs the package no longer.
    moved(tmp_path / "two", tmp_path / "three", monkeypatch)
    monkeypatch.setattr("sys.path", [p for p in os.sys.path if p != str(tmp_path / "three")])
    importlib.invalidate_caches()
    assert torch.equal(embed(checkpoint.load_any(tmp_path / "out").eval()), expected)
    if kind == "huggingface":
        with pytest.raises(ValueError, match="run: pip install tiny-language-for-tests"):
            checkpoint.load_model(run)


def test_a_run_of_before_holds_a_path_of_its_machine(tmp_path, monkeypatch):
    old = install(tmp_path / "one/lib/python3.11/site-packages", monkeypatch)
    language_model(old / NAME / "model")
    place = str(old / NAME / "model")
    tower = {"name": "huggingface", "model": place, "context_length": 12, "pretrained": False}
    model = tiny(text_tower=tower)
    expected = embed(model)
    run = saved(model, tmp_path / "run")
    assert place.encode() in contents_of(run) and packages.local(place) == place

    moved(old, tmp_path / "two", monkeypatch)
    assert packages.local(place) == str(tmp_path / "two" / NAME / "model")
    assert torch.equal(embed(checkpoint.load_model(run)), expected)
    export(checkpoint.load_model(run), tmp_path / "out")
    described = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    assert described["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "."


def test_only_an_absent_place_among_packages_is_looked_for():
    unchanged = ["/nowhere/model", f"site-packages/{NAME}", "owner/name", packages.__file__]
    for reference in unchanged:
        assert packages.local(reference) == reference
    with pytest.raises(ValueError, match="package:absent/model: no package 'absent' is installed"):
        packages.local("/x/site-packages/absent/model")
    assert len(unchanged) == 4
