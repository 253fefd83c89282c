"""A language model as text tower leaves with its weights, and loads where its source is gone."""

import os

import pytest
import torch

from tests.models.languages import FAMILIES, language_model
from tests.models.tiny import tiny
from vlp import checkpoint
from vlp.eval import models
from vlp.export.folder import export, export_concatenated, export_run
from vlp.export.place import ExportError

TEXTS = ["two red circles", "a dog", "a photo of a blue square cat"]
KINDS = {
    "llama": {"pool": "mean", "prompt": "a photo of {}"},
    "qwen3": {"pool": "latent", "latents": 5, "heads": 4, "attention": "bidirectional"},
    "gemma3_text": {"pool": "last", "adaptor": {"layers": 1, "width": 24}},
    "mistral": {"pool": "eos"},
    "gpt2": {"pool": "last", "prompt": "{} a photo of two words", "context_length": 9},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_loads_again_without_its_source_from_anywhere(family, tmp_path, monkeypatch):
    source = language_model(tmp_path / "a model", family)
    text = {"name": "llm", "model": str(source), "context_length": 12} | KINDS[family]
    model = tiny(text_tower=text)
    expected = models.from_model(model).encode_texts(TEXTS)

    description = model.description()
    contents = checkpoint.Contents(model.state_dict(), {}, config="a: b", description=description)
    checkpoint.save(tmp_path / "run", 1, contents, keep=1)
    notes = export_run(tmp_path / "run", tmp_path / "an export")
    os.rename(source, tmp_path / "gone")
    os.rename(tmp_path / "an export", tmp_path / "moved")
    assert notes[0].startswith("vlp: ") and "sentence-transformers: no model of theirs" in notes[1]
    assert (tmp_path / "moved/text_tower/config.json").is_file()
    card = (tmp_path / "moved/README.md").read_text()
    assert "library_name: vlp" in card and "import open_clip" not in card

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for reference in (str(tmp_path / "moved"), "../moved"):
        encoder = models.load(reference)
        torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, rtol=0, atol=1e-6)

    # Once more from what was loaded, and as a stage.
    export_concatenated(["../moved"] * 2, "../stages")
    twice = models.load("../stages").encode_texts(TEXTS)
    torch.testing.assert_close(twice @ twice.T, expected @ expected.T, rtol=0, atol=1e-5)


def test_onnx_is_refused_before_anything_is_written(tmp_path):
    text = {"name": "llm", "model": str(language_model(tmp_path / "llm")), "context_length": 8}
    with pytest.raises(ExportError, match=r"ONNX has no form for a language model.*leave out"):
        export(tiny(text_tower=text), tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()
