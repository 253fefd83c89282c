"""Captions embedded by a language model before training: stored, checked, trained on, exported."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.data_tools.tools import call
from tests.models.languages import language_model
from vlp import checkpoint
from vlp.data_tools import embed
from vlp.eval import models
from vlp.export.folder import export_run
from vlp.text_store import TextStore
from vlp.train import train


@pytest.fixture(scope="module")
def made(scenes, tmp_path_factory):
    """A language model, and the store of the scenes' captions by it."""
    folder = tmp_path_factory.mktemp("stored texts")
    llm = language_model(folder / "llm", "qwen3")
    options = ("--text-model", llm, "--pool", "mean", "--prompt", "a photo of {}")
    call(embed, scenes / "train", *options, "--context-length", 24, "--to", folder / "store")
    return llm, folder / "store"


def stored(folder, *more):
    tower = f"name: stored, embeddings: '{folder}', adaptor: {{layers: 1, width: 8}}"
    return (
        f"model.text_tower={{{tower}}}",
        "data.workers=0",
        "train.duration=3",
        *more,
    )


def rewritten(folder, target, change, shift=0):
    """A copy of a store with other rows, or other texts, that says the same of them."""
    target.mkdir()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        tensors = load_file(path)
        tensors["text"] = change(tensors["text"]).contiguous()
        tensors["digest"] += shift
        save_file(tensors, target / path.name, about)
    return target


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_stored_texts_train_as_the_model_that_runs(settings, made, tmp_path, monkeypatch):
    """The rows of the store, and the language model itself behind the same adaptor, are one."""
    llm, folder = made
    for choose in ("first", "all"):
        captions = f"data.captions={{choose: {choose}}}"
        run = train(settings(*stored(folder, captions), out=f"stored {choose}"))
        assert len(set(curve(run))) == 3
    # What passes the text tower are rows, and no tokens.
    assert "samples_s" in (run / "metrics.jsonl").read_text()
    assert "text_tokens" not in (run / "metrics.jsonl").read_text()

    # Every weight that the checkpoint holds is the run's; what ids give is what rows give.
    model = checkpoint.load_model(run)
    assert not any("transformer" in name for name, _ in model.text.named_parameters())
    texts = list_of_captions(settings)[:5]
    rows, _ = TextStore(str(folder)).tokenize(texts)
    encoder = models.from_model(model)
    expected = encoder.encode_texts(texts)
    with torch.no_grad():
        torch.testing.assert_close(model(text=rows).text, expected, rtol=0, atol=2e-3)

    # What is exported names the language model and runs it.
    notes = export_run(run, tmp_path / "out")
    assert any(f"runs the language model {llm.name} (weights " in note for note in notes)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(models.load("out").encode_texts(texts), expected)

    os.rename(llm, tmp_path / "gone")
    language_model(llm, "qwen3", seed=5)  # another one under its name
    from vlp.models import language

    language.forget()
    with pytest.raises(ValueError, match=r"has other weights \(.*\) than the language model"):
        train(settings(*stored(folder), out="refused"))
    with pytest.raises(ValueError, match=r"has other weights \(.*\) than the language model"):
        models.load("out").encode_texts(texts)
    for file in llm.iterdir():
        file.unlink()
    os.rename(tmp_path / "gone", llm)


def list_of_captions(settings):
    data = settings().data
    [source] = data.sources
    opened = source.module.open(source.options, data.captions)
    return [opened[i].captions[0] for i in range(len(opened))]


def test_other_rows_are_refused_and_scaled_ones_pass(settings, made, tmp_path):
    _, folder = made
    torch.manual_seed(0)
    wrong = {
        "foreign": torch.randn_like,
        "shuffled": lambda rows: rows.roll(1, dims=0),
        "negated": lambda rows: -rows,
    }
    n_refused = 0
    for name, change in wrong.items():
        changed = rewritten(folder, tmp_path / name, change)
        with pytest.raises(ValueError, match=r"text embeddings are not made by .*llm: 8 samples"):
            train(settings(*stored(changed), out="refused"))
        n_refused += 1
    assert n_refused == 3 and not (tmp_path / "refused").exists()

    longer = rewritten(folder, tmp_path / "longer", lambda rows: 3 * rows)
    plain = train(settings(*stored(folder), out="plain"))
    scaled = train(settings(*stored(longer), out="scaled"))
    assert curve(scaled) == pytest.approx(curve(plain), rel=1e-3)


def test_a_language_model_that_is_not_here_is_said(settings, made, tmp_path, capsys):
    llm, folder = made
    os.rename(llm, tmp_path / "gone")
    try:
        train(settings(*stored(folder), out="said"))
        said = f"not compared with {llm}, which cannot be run here (no such folder)"
        assert capsys.readouterr().err.count(said) == 1
        evaluated = f"eval={{retrieval: {{data: {tmp_path}}}}}"
        with pytest.raises(ValueError, match="eval needs the language model"):
            train(settings(*stored(folder, evaluated), out="refused"))
    finally:
        os.rename(tmp_path / "gone", llm)


def test_what_does_not_go_with_stored_texts_is_refused(settings, made, tmp_path, scenes):
    llm, folder = made
    others = rewritten(folder, tmp_path / "others", lambda tensors: tensors, shift=1)
    cases = {
        "another store": (stored(tmp_path), "holds no stored text embeddings"),
        "captions that are not there": (stored(others), "has no embedding of the caption"),
        "a teacher of tokens": (
            stored(folder, "teacher.model=x", "objective={distill: {}}"),
            "teacher.model x reads tokens",
        ),
        "precomputed": (
            ("model.text_tower.locked=true", "model.text_tower.precomputed=true"),
            "precomputed is of image towers",
        ),
    }
    for name, (overrides, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            train(settings(*overrides, out=name))
        assert not (tmp_path / name).exists()

    store = TextStore(str(folder))
    with pytest.raises(ValueError, match="has no embedding of the caption 'never seen'"):
        store.tokenize(["", "never seen"])
    assert not store.tokenize([""])[0].any()
    for options, message in (
        (("--text-model", tmp_path / "none"), "no Hugging Face model configuration"),
        (("--text-model", llm, "--prompt", "none"), "expected one"),
    ):
        with pytest.raises(ValueError, match=message):
            call(embed, scenes / "train", *options, "--to", tmp_path / "other")
    assert not (tmp_path / "other").exists()
