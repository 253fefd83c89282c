"""Exports in other dtypes and for other sizes of pictures, as their consumers load them."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from tests.export.test_export_more import described, resnet
from tests.models.tiny import inputs, language_model, tiny
from vlp.cli import main
from vlp.export.folder import export, export_concatenated
from vlp.export.place import ExportError
from vlp.models.load import load
from vlp.pretrained import image_size

# dtype → the least cosine that its rounding leaves on the tiny models
DTYPES = {"float16": 0.99999, "bf16": 0.999}


def towers(kind, folder):
    text = {"name": "huggingface", "context_length": 12, "pretrained": False}
    if kind == "clip":
        return {}
    keys = text | {"model": str(language_model(folder)), "pooler": "mean_pooler"}
    return {"text_tower": keys, "image_tower": {"name": "timm", "model": "test_vit"}}


@pytest.mark.parametrize(
    "kind, name",
    [
        ("two parts", "bf16"),
        pytest.param("two parts", "float16", marks=pytest.mark.slow),
        pytest.param("clip", "bf16", marks=pytest.mark.slow),
        pytest.param("clip", "float16", marks=pytest.mark.slow),
    ],
)
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
        for key, value in load_file(whole).items():
            spacing = torch.finfo(stored[key].dtype)
            apart = (stored[key].double() - value.double()).abs()
            assert (apart <= value.abs() * spacing.eps / 2 + spacing.smallest_normal).all(), key

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


@pytest.mark.parametrize("size", [pytest.param(16, marks=pytest.mark.slow), 48])
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


SMALL_VIT = {"name": "vit", "patch_size": 8, "width": 16, "layers": 1, "head_width": 16}
# image towers of other kinds, and a size that each can be brought to
OTHERS = {
    "timm's transformer": (lambda folder: {"name": "timm", "model": "test_vit"}, 192),
    "timm's convolutions": (lambda folder: {"name": "timm", "model": "test_resnet"}, 96),
    "open_clip's ResNet": (resnet, 96),
    "not square": (lambda folder: SMALL_VIT | {"image_size": [16, 32]}, 24),
}
FAST = ("open_clip's ResNet", "not square")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in OTHERS],
)
def test_another_size_is_that_of_training_at_it(kind, tmp_path):
    """The weights of the model, read by a configuration of the other size, embed the same."""
    tower, size = OTHERS[kind]
    trained = tiny(image_tower=tower(tmp_path))
    export(trained, tmp_path / "trained")
    export(trained, tmp_path / "out", image_size=size)
    resized = load(tmp_path / "out").eval()
    assert resized.image_spec.size == (size, size)

    expected = load(tmp_path / "trained").eval()
    image_size.resize(expected.visual, (size, size))
    pixels, _ = inputs(resized)
    with torch.no_grad():
        rows = expected.visual(resized.pixels(pixels))
        rows = torch.nn.functional.normalize(rows, dim=-1)
        assert (resized(pixels, None).image - rows).abs().max() <= 1e-6


def test_a_size_that_the_tower_refuses_is_answered_with_ones_that_work(tmp_path):
    refused = [
        (SMALL_VIT | {"image_size": 16}, 28, "32"),
        ({"name": "timm", "model": "test_vit"}, 100, "96 or 112"),
        (resnet(tmp_path), 100, "96 or 128"),
    ]
    for tower, size, others in refused:
        message = rf"--image-size {size}: .*sizes that work are {others}"
        with pytest.raises(ExportError, match=message):
            export(tiny(image_tower=tower), tmp_path / "out", image_size=size)
    assert len(refused) == 3 and not (tmp_path / "out").exists()


def test_what_no_model_can_be_written_by_is_refused_before_one_is_read(tmp_path, monkeypatch):
    """The model itself is absent: whoever reads it first fails otherwise."""
    from vlp import averaging
    from vlp.export import onnx_form
    from vlp.export.folder import export_average, export_concatenated, export_run

    monkeypatch.setattr(onnx_form, "_NEEDED", ("onnx_that_is_not_there",))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("precious")
    absent = str(tmp_path / "absent")
    out = tmp_path / "out"
    pair = averaging.Members([absent, absent], [0.5, 0.5])
    ways = [
        lambda to, **keys: export_run(absent, to, **keys),
        lambda to, **keys: export_concatenated([absent, absent], to, **keys),
        lambda to, **keys: export_average(pair, to, **keys),
    ]
    wishes = [
        (out, {"dtype": "fp8"}, "expected one of float32, float16, bf16"),
        (out, {"license": "apache2.0"}, "did you mean 'apache-2.0'"),
        (out, {"image_size": 0}, "image_size is 0; expected pixels"),
        (out, {"onnx": True}, "needs onnx_that_is_not_there"),
        (tmp_path / "full", {}, "is a folder that is not empty"),
        (tmp_path / "full/file", {"overwrite": True}, "is a file"),
        (".", {}, "has no name of its own"),
        (tmp_path / "..", {"overwrite": True}, "has no name of its own"),
    ]
    n_refused = 0
    for to, keys, message in wishes:
        for way in ways:
            with pytest.raises(ValueError, match=message):
                way(to, **keys)
            n_refused += 1
    assert n_refused == 24 and sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_bar_in_a_name_begins_no_cell(tmp_path):
    record = {"task": "grouped", "dataset": "a|b", "metrics": {"group:c|d": 0.25}}
    export(tiny(), tmp_path / "out", results=[record])
    card = (tmp_path / "out/README.md").read_text()
    assert "| grouped | a\\|b |  | group:c\\|d | 0.25 |" in card


RECORD = {"task": "zeroshot_classification", "dataset": "photos", "metrics": {"acc1": 0.2749}}


def test_scores_of_one_size_are_not_those_of_another(tmp_path):
    from vlp import checkpoint
    from vlp.export.folder import export_run

    model = tiny()
    contents = checkpoint.Contents(
        model.state_dict(), {}, config="out: run", description=model.description()
    )
    checkpoint.save(tmp_path / "run", 1, contents, keep=1)
    (tmp_path / "run/results.json").write_text(json.dumps([RECORD]))
    sizes = {"trained": None, "the same": 32, "larger": 48}
    for name, size in sizes.items():
        export_run(tmp_path / "run", tmp_path / name, image_size=size)
        card = (tmp_path / name / "README.md").read_text()
        is_trained = size in (None, 32)
        assert ("| photos |  | acc1 | 0.2749 |" in card) == ("model-index" in card) == is_trained
        assert ("not evaluated at this size" in card) == ("Not evaluated." in card) != is_trained

    # Exported once more, neither.
    export_run(tmp_path / "larger", tmp_path / "again")
    assert "0.2749" not in (tmp_path / "again/README.md").read_text()
    assert len(sizes) == 3


@pytest.mark.parametrize(
    "kind",
    [
        "clip",
        "resnet",
        pytest.param("timm", marks=pytest.mark.slow),
        pytest.param("siglip", marks=pytest.mark.slow),
        pytest.param("mean pooling", marks=pytest.mark.slow),
        pytest.param("two parts", marks=pytest.mark.slow),
    ],
)
def test_a_width_is_the_first_numbers_of_the_embeddings(kind, tmp_path):
    """In the folder, and in open_clip, of a width that is no multiple of 8."""
    keys = towers(kind, tmp_path) if kind == "two parts" else described(kind, tmp_path)
    model = tiny(**keys)
    notes = export(model, tmp_path / "out", width=12)
    assert any(f"first 12 of {model.embed_dim} numbers" in note for note in notes)

    narrow = load(tmp_path / "out").eval()
    pixels, ids = inputs(model)
    with torch.no_grad():
        whole, rows = model(pixels, ids), narrow(pixels, ids)
        theirs = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
        image = theirs.encode_image(model.pixels(pixels), normalize=True)
    assert narrow.embed_dim == 12 and torch.equal(rows.scale, whole.scale)
    for side in ("image", "text"):
        expected = torch.nn.functional.normalize(getattr(whole, side)[:, :12], dim=-1)
        assert (getattr(rows, side) - expected).abs().max() <= 1e-5
    assert (image - rows.image).abs().max() <= 1e-5


def test_a_width_that_cannot_be_cut_is_refused(tmp_path):
    model = tiny()
    width = model.embed_dim
    with pytest.raises(ExportError, match=f"--width is {width + 1}, but the embeddings have"):
        export(model, tmp_path / "out", width=width + 1)
    with pytest.raises(ExportError, match=r"--width 8 is of one model's embeddings"):
        export_concatenated([tmp_path / "a", tmp_path / "b"], tmp_path / "out", width=8)
    # Two layers, of which the hidden one has a width between the tower's and D.
    text = {"name": "huggingface", "context_length": 12, "pretrained": False}
    text |= {"model": str(language_model(tmp_path)), "pooler": "mean_pooler", "proj": "mlp"}
    with pytest.raises(ExportError, match=r"--width 8: .*vlp eval, search and embed cut"):
        export(tiny(text_tower=text), tmp_path / "out", width=8)
    assert not (tmp_path / "out").exists()
