"""Forms whose libraries are not among vlp's own dependencies but in its extra `hub`, which `dev`
brings along.
"""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import VIT, inputs, language_model, siglip, tiny
from vlp.eval import models
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
        "huggingface, mean": lambda: {
            "text_tower": language
            | {"model": str(language_model(folder)), "pooler": "mean_pooler", "proj": "mlp"},
            "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 64},
        },
        "mobilenet": lambda: {
            "image_tower": {"name": "timm", "model": "mobilenetv3_small_050", "image_size": 64},
        },
        "resnet": lambda: {"image_tower": resnet(folder)},
    }[kind]()


def resnet(folder):
    """open_clip's own ResNet, small."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    described = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}
    (folder / "resnet.json").write_text(json.dumps(described))
    return {"name": "open_clip", "architecture": str(folder / "resnet.json")}


def noise(model):
    """A picture of the size that the model reads, so that no library needs to resize it."""
    shape = (*model.image_spec.size, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


# kind → the class that transformers loads, and the folder it lies in; None: it has none
CONSUMED = {
    "clip": ("CLIPModel", ""),
    "siglip": ("SiglipModel", ""),
    "timm": ("VisionTextDualEncoderModel", "transformers"),
    "huggingface": ("VisionTextDualEncoderModel", "transformers"),
    "huggingface, mean": None,
    "mobilenet": None,
}


@pytest.mark.parametrize("kind", CONSUMED)
def test_sentence_transformers_and_transformers_embed_texts_and_pictures(kind, tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    model = tiny(**described(kind, tmp_path))
    notes = export(model, tmp_path / "out")
    assert any(note.startswith("sentence-transformers: ") for note in notes)
    encoder = models.from_model(model)
    texts = ["two red circles", "a dog", "a photo of a dog " * 9]
    picture = noise(model)
    expected = encoder.encode_texts(texts), encoder.encode_images([picture])

    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    assert sorted(theirs.modalities) == ["image", "text"]
    assert theirs.similarity_fn_name == "cosine"
    rows = theirs.encode(texts, convert_to_tensor=True)
    assert (rows - expected[0]).abs().max() <= 1e-6
    rows = theirs.encode([picture], convert_to_tensor=True)
    assert (rows - expected[1]).abs().max() <= 1e-6

    if CONSUMED[kind] is None:
        assert any(note.startswith("transformers: no VisionTextDual") for note in notes)
        return
    name, subfolder = CONSUMED[kind]
    network = AutoModel.from_pretrained(tmp_path / "out", subfolder=subfolder).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", subfolder=subfolder)
    assert type(network).__name__ == name
    prepared = processor(
        text=texts, images=picture, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        output = network(**prepared)
    assert (output.text_embeds - expected[0]).abs().max() <= 1e-6
    assert (output.image_embeds - expected[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["timm", "huggingface", "huggingface, mean"])
def test_texts_of_every_length_are_pooled_as_in_training(kind, tmp_path):
    """Alone, beside longer ones, and padded to the context."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    model = tiny(**described(kind, tmp_path))
    export(model, tmp_path / "out")
    context = model.text_spec.context_length
    texts = ["dog " * n_words for n_words in range(context + 2)]
    expected = models.from_model(model).encode_texts(texts)
    # No two lengths give one embedding, so that a wrong place to read shows.
    apart = torch.cdist(expected[: context - 2], expected[: context - 2])
    assert apart.fill_diagonal_(1).min() > 1e-3

    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    for batch_size in (1, 64):
        rows = theirs.encode(texts, batch_size=batch_size, convert_to_tensor=True)
        assert (rows - expected).abs().max() <= 1e-6

    if CONSUMED[kind] is None:
        return
    place = tmp_path / "out/transformers"
    network = AutoModel.from_pretrained(place).eval()
    processor = AutoProcessor.from_pretrained(place)
    for padding in (True, "max_length"):
        prepared = processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
        with torch.no_grad():
            output = network.get_text_features(**prepared)
        rows = torch.nn.functional.normalize(output.pooler_output, dim=-1)
        assert (rows - expected).abs().max() <= 1e-6


def test_forms_are_compared_on_texts_from_one_token_to_the_context(tmp_path, monkeypatch):
    from vlp.export import parts

    model = tiny(**described("huggingface, mean", tmp_path))
    _, ids = parts.example(model)
    n_tokens = (ids != model.text.config.pad_token_id).sum(dim=1)
    assert n_tokens.tolist() == [1, 2, 6, 11, 12]

    # Without its mask the tower pools padding, too.
    monkeypatch.setattr(parts, "text_inputs", lambda model, ids: parts_without_mask(ids))
    notes = export(model, tmp_path / "out")
    assert any("because its embeddings differ by" in note for note in notes)
    assert not (tmp_path / "out/modules.json").exists()


def parts_without_mask(ids):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("length", [12, 64, 70])
def test_transformers_pipeline_takes_a_siglip_of_any_context(length, tmp_path, monkeypatch):
    tower = siglip(tmp_path, context_length=length)
    model = tiny(image_tower=tower, text_tower=None, embed_dim=None, bias=-10.0)
    export(model, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    blocks = [
        block for block in re.findall("```python\n(.*?)```", card, re.S) if "pipeline" in block
    ]
    assert len(blocks) == (length != 64)

    # As the card says; at 64 tokens the pipeline needs no telling.
    monkeypatch.chdir(tmp_path)
    picture = noise(model)
    picture.save("photo.jpg", quality=100)
    names = {}
    code = "from transformers import pipeline\n"
    code += 'classify = pipeline("zero-shot-image-classification", model="out")\n'
    exec(blocks[0] if blocks else code, names)
    answers = names["classify"](picture, candidate_labels=["cat", "dog"], hypothesis_template="{}")
    encoder = models.from_model(model)
    cosines = encoder.encode_images([picture]) @ encoder.encode_texts(["cat", "dog"]).T
    expected = torch.sigmoid(encoder.scale * cosines[0] - 10.0)
    scores = {answer["label"]: answer["score"] for answer in answers}
    theirs = torch.tensor([scores["cat"], scores["dog"]])
    torch.testing.assert_close(theirs, expected, rtol=1e-3, atol=1e-7)


def test_a_context_beyond_the_language_models_positions_is_no_form_of_transformers(tmp_path):
    text = described("huggingface", tmp_path)["text_tower"] | {"context_length": 20}
    notes = export(tiny(text_tower=text), tmp_path / "out")
    assert any("20 tokens, and its language model has 16 positions" in note for note in notes)
    assert not (tmp_path / "out/modules.json").exists()


def test_captions_that_only_training_cleaned_are_no_form_of_transformers(tmp_path):
    text = described("huggingface", tmp_path)["text_tower"] | {"clean": "canonicalize"}
    notes = export(tiny(text_tower=text), tmp_path / "out")
    assert any("captions are cleaned by 'canonicalize'" in note for note in notes)
    assert not (tmp_path / "out/modules.json").exists()


SLOW = [
    pytest.param(kind, marks=pytest.mark.slow)
    for kind in ("clip", "mean pooling", "timm", "mobilenet", "resnet", "siglip", "huggingface")
]


@pytest.mark.parametrize("kind", SLOW)  # a sample: test_consumers
def test_onnx(kind, tmp_path):
    import onnxruntime

    model = tiny(**described(kind, tmp_path))
    notes = export(model, tmp_path / "out", onnx=True)
    lines = [note for note in notes if note.startswith("ONNX: ")]
    assert len(lines) == 2 and all(" opset 18, any number of rows" in line for line in lines)

    # SigLIP's tower attends to padding: its texts are always as long as the context.
    shorter = () if kind == "siglip" else (3, 2)
    n_compared = 0
    for rows in (1, 2, 5):
        pixels, ids = inputs(model, rows=rows)
        for n_fewer in (0, *shorter):
            texts = ids[:, n_fewer:] if n_fewer else ids
            fed = {"image": ("pixel_values", model.pixels(pixels)), "text": ("input_ids", texts)}
            with torch.no_grad():
                ours = model(pixels, texts)
            for side, (name, value) in fed.items():
                session = onnxruntime.InferenceSession(
                    tmp_path / f"out/onnx/{side}.onnx", providers=["CPUExecutionProvider"]
                )
                (embedded,) = session.run([f"{side}_embeds"], {name: value.numpy()})
                apart = torch.from_numpy(embedded) - getattr(ours, side)
                assert apart.abs().max() <= TOLERANCE, (side, rows, n_fewer)
                n_compared += 1
    assert n_compared == 6 * (1 + len(shorter))


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    from vlp.export import onnx_form

    monkeypatch.setattr(onnx_form, "_NEEDED", ("onnx_that_is_not_there",))
    with pytest.raises(onnx_form.OnnxError, match=r"needs onnx_that_is_not_there.*vlp\[hub\]"):
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
