"""Forms whose libraries are not among vlp's own dependencies but in its extra `hub`, which `dev`
brings along.
"""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import VIT, inputs, language_model, siglip, tiny
from vlp.export.folder import export

TOLERANCE = 1e-5


def described(kind, folder):
    language = {"name": "huggingface", "model": "", "context_length": 12, "pretrained": False}
    return {
        "clip": lambda: {},
        "mean pooling": lambda: {"image_tower": VIT | {"pool": "avg"}},
        "timm": lambda: {"image_tower": {"name": "timm", "model": "test_resnet", "image_size": 64}},
        "siglip": lambda: {
            "image_tower": siglip(folder),
            "text_tower": None,
            "embed_dim": None,
            "bias": -10.0,
        },
        "huggingface": lambda: {"text_tower": language | {"model": str(language_model(folder))}},
    }[kind]()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_sentence_transformers(kind, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from transformers import AutoProcessor

    model = tiny(**described(kind, tmp_path))
    notes = export(model, tmp_path / "out")
    assert any(note.startswith("sentence-transformers: ") for note in notes)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = (
        ["two red circles", "a dog"]
        if kind == "siglip"
        else ["two red circles", "a dog that is too long " * 9]
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = processor.tokenizer(
        texts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    pixels = processor.image_processor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        ours = model(pixels, ids)
    assert (theirs.encode(texts, convert_to_tensor=True) - ours.text).abs().max() <= TOLERANCE
    assert (theirs.encode([image], convert_to_tensor=True) - ours.image).abs().max() <= TOLERANCE


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("mean pooling", "timm", "siglip", "huggingface")
]


@pytest.mark.parametrize("kind", ["clip", *SLOW])
def test_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny(**described(kind, tmp_path))
    notes = export(model, tmp_path / "out", onnx=True)
    assert sum(note.startswith("ONNX: ") for note in notes) == 2
    for rows in (1, 2, 5):
        pixels, ids = inputs(model, rows=rows)
        normalised = model.pixels(pixels)
        with torch.no_grad():
            ours = model(pixels, ids)
        for file, fed, row in (
            ("image", {"pixel_values": normalised}, ours.image),
            ("text", {"input_ids": ids}, ours.text),
        ):
            session = onnxruntime.InferenceSession(
                tmp_path / f"out/onnx/{file}.onnx", providers=["CPUExecutionProvider"]
            )
            (found,) = session.run(
                [f"{file}_embeds"], {name: value.numpy() for name, value in fed.items()}
            )
            assert (torch.from_numpy(found) - row).abs().max() <= TOLERANCE


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    from vlp.export import onnx_form

    monkeypatch.setattr(onnx_form, "_NEEDED", ("onnx_that_is_not_there",))
    with pytest.raises(onnx_form.OnnxError, match="pip install onnx_that_is_not_there"):
        export(tiny(), tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_what_the_exporter_raises_is_explained(tmp_path, monkeypatch):
    from vlp.export import onnx_form

    def failing(*_, **__):
        raise RuntimeError("an operator that ONNX does not know\nand a page of graph")

    monkeypatch.setattr(onnx_form, "_NEEDED", ())
    monkeypatch.setitem(sys.modules, "onnxruntime", object())
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(
        onnx_form.OnnxError,
        match=r"^the image tower cannot be written .*does not know\); leave out --onnx",
    ):
        export(tiny(), tmp_path / "out", onnx=True)
    assert list(tmp_path.iterdir()) == []
