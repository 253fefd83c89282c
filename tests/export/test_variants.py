"""Exports in other dtypes and for other sizes of pictures, as their consumers load them."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tests.models.tiny import inputs, language_model, tiny
from vlp.cli import main
from vlp.export.folder import export
from vlp.export.place import ExportError
from vlp.models.load import load

# dtype → the least cosine that its rounding leaves on the tiny models
DTYPES = {"float16": 0.99999, "bf16": 0.999}


def towers(kind, folder):
    text = {"name": "huggingface", "context_length": 12, "pretrained": False}
    if kind == "clip":
        return {}
    keys = text | {"model": str(language_model(folder)), "pooler": "mean_pooler"}
    return {"text_tower": keys, "image_tower": {"name": "timm", "model": "test_vit"}}


@pytest.mark.parametrize("kind", ["clip", "two parts"])
@pytest.mark.parametrize("name", DTYPES)
def test_half_of_the_bytes_and_nearly_the_same_embeddings(kind, name, tmp_path):
    from sentence_transformers import SentenceTransformer

    least = DTYPES[name]
    model = tiny(**towers(kind, tmp_path))
    export(model, tmp_path / "whole")
    notes = export(model, tmp_path / "half", dtype=name)
    (line,) = [note for note in notes if note.startswith("weights: ")]
    assert line in (tmp_path / "half/README.md").read_text()

    files = sorted((tmp_path / "half").rglob("*.safetensors"))
    assert len(files) >= 2
    for path in files:
        stored = load_file(path)
        wide = {k for k, v in stored.items() if v.dtype == torch.float32}
        assert wide <= {"logit_scale", "logit_bias"}, path
        whole = tmp_path / "whole" / path.relative_to(tmp_path / "half")
        assert path.stat().st_size < 0.7 * whole.stat().st_size

    pixels, ids = inputs(model)
    with torch.no_grad():
        ours, again = model(pixels, ids), load(tmp_path / "half").eval()(pixels, ids)
        theirs = open_clip.create_model(f"local-dir:{tmp_path / 'half'}").eval()
        image = theirs.encode_image(model.pixels(pixels), normalize=True)
    cosines = (ours.image * again.image).sum(-1), (ours.text * again.text).sum(-1)
    assert all(least <= rows.min() < 1 - 1e-9 for rows in cosines)
    assert float(line.rpartition(" ")[2]) >= least
    assert (image - again.image).abs().max() <= 1e-5 and torch.equal(ours.scale, again.scale)
    consumer = SentenceTransformer(str(tmp_path / "half"), device="cpu", local_files_only=True)
    whole = SentenceTransformer(str(tmp_path / "whole"), device="cpu", local_files_only=True)
    rows = [each.encode(["a dog"], convert_to_tensor=True).float() for each in (consumer, whole)]
    assert torch.cosine_similarity(*rows).item() >= least - 0.01


def test_transformers_loads_in_the_stated_dtype(tmp_path):
    from transformers import AutoModel

    export(tiny(), tmp_path / "half", dtype="bf16")
    stated = json.loads((tmp_path / "half/config.json").read_text())
    assert stated["dtype"] == stated["text_config"]["dtype"] == "bfloat16"
    assert AutoModel.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_numbers_beyond_float16_are_refused(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.visual.ln_post.weight[0] = 1e6
    with pytest.raises(ExportError, match=r"visual\.ln_post\.weight holds 1e\+06.*--dtype bf16"):
        export(model, tmp_path / "out", dtype="float16")
    with pytest.raises(ExportError, match="expected one of float32, float16, bf16"):
        export(model, tmp_path / "out", dtype="fp8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [16, 48])
def test_another_size_is_open_clips_force_image_size(size, tmp_path):
    model = tiny()
    export(model, tmp_path / "trained")
    assert (
        main(
            [
                "export",
                str(tmp_path / "trained"),
                "--to",
                str(tmp_path / "out"),
                f"--image-size={size}",
            ]
        )
        == 0
    )
    ours = load(tmp_path / "out").eval()
    theirs = open_clip.create_model(
        f"local-dir:{tmp_path / 'trained'}", force_image_size=size
    ).eval()
    assert ours.image_spec.size == (size, size)
    pixels, ids = inputs(ours)
    with torch.no_grad():
        expected = theirs.encode_image(ours.pixels(pixels), normalize=True)
        rows = ours(pixels, ids)
        assert torch.equal(rows.text, load(tmp_path / "trained").eval()(None, ids).text)
    assert (rows.image - expected).abs().max() <= 1e-6
    described = json.loads((tmp_path / "out/config.json").read_text())
    assert described["vision_config"]["image_size"] == size


def test_a_size_that_the_tower_refuses_is_answered_with_ones_that_work(tmp_path):
    with pytest.raises(ExportError, match=r"size is 30, .* patches have 8 pixels; .* 24, 32"):
        export(tiny(), tmp_path / "out", image_size=30)
    timm = {"name": "timm", "model": "test_resnet", "image_size": 64}
    with pytest.raises(ExportError, match="is timm's test_resnet, which open_clip reloads at 64"):
        export(tiny(image_tower=timm), tmp_path / "out", image_size=96)
    assert list(tmp_path.iterdir()) == []
