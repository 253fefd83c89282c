"""Every form of an export in the libraries that load it, in processes that cannot import vlp.

`FORMS` says who loads which; the table of docs/guides/export.md says the same.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.material import png
from tests.export.test_export_more import described, noise
from tests.export.test_places import places
from tests.loopback_hub import TOKEN, loopback_hub
from tests.models import small_siglip
from tests.models.tiny import TEXT, inputs, tiny
from vlp.data import text
from vlp.data.format import ShardWriter
from vlp.eval import models
from vlp.export.folder import export
from vlp.export.int8_form import Int8
from vlp.export.push import push

TOLERANCE = 1e-5  # largest difference of a coordinate
PACKAGES = Path(torch.__file__).parents[1]
SCRIPT = Path(__file__).with_name("consumers.py")
GUIDE = Path(__file__).parents[2] / "docs/guides/export.md"

OPEN_CLIP = ("open_clip_folder", "open_clip_hub")
TRANSFORMERS = ("transformers", "pipeline", "sentence_transformers")
ARRAYS = ("onnx", "onnx_int8", "safetensors")
LEAST_COSINE = 0.98  # of 8 bits with float32, on the tiny models


@dataclass(frozen=True)
class Form:
    """A kind of export: the towers that it is of, and who loads it."""

    keys: str  # of `described`, or below
    consumers: tuple[str, ...]
    kind: str | None = None  # the class that transformers loads
    subfolder: str = ""
    dtype: str = "float32"
    more: dict = field(default_factory=dict)  # keys of the model section
    row: str = ""  # its name in the guide's table; "": of the same row as another

    @property
    def tolerance(self) -> float:
        """Of coordinates near 1/7: float32's rounding, or some spacings of the dtype."""
        return {"float32": TOLERANCE, "float16": 2e-3, "bf16": 2e-2}[self.dtype]


def of_length(length):
    return {"text_tower": TEXT | {"context_length": length}}


TIMM = {"name": "timm", "model": "test_vit"}
DUAL = ("VisionTextDualEncoderModel", "transformers")
CLIP = (*OPEN_CLIP, *TRANSFORMERS)
FORMS = {
    "clip": Form("clip", (*CLIP, *ARRAYS), "CLIPModel", row="CLIP's two transformers"),
    "siglip": Form("siglip", CLIP, "SiglipModel", row="SigLIP's two transformers"),
    "timm": Form("timm vit", (*CLIP, "timm"), *DUAL, row="a timm trunk, CLIP's text tower"),
    "router": Form(
        "huggingface, mean",
        (*OPEN_CLIP, "sentence_transformers", "timm"),
        row="a timm trunk, a language model pooled by its mean",
    ),
    "language model": Form(
        "huggingface",
        CLIP,
        *DUAL,
        row="CLIP's vision transformer, a language model of Hugging Face",
    ),
    "mean pooling": Form("mean pooling", OPEN_CLIP, row="CLIP's with mean pooling of patches"),
    "mobilenet": Form(
        "mobilenet",
        (*OPEN_CLIP, "sentence_transformers", "timm"),
        row="a timm trunk with layers before its classifier (MobileNet)",
    ),
    "resnet": Form("resnet", OPEN_CLIP, row="open_clip's ResNet, CLIP's text tower"),
    "clip, a bias": Form("clip", CLIP, "CLIPModel", more={"bias": -4.0}),
    "clip, 64 tokens": Form("clip", CLIP, "CLIPModel", more=of_length(64)),
    "clip, 128 tokens": Form("clip", CLIP, "CLIPModel", more=of_length(128)),
    "clip in float16": Form("clip", CLIP, "CLIPModel", dtype="float16"),
    "clip in bf16": Form("clip", CLIP, "CLIPModel", dtype="bf16"),
    "siglip in bf16": Form("siglip", CLIP, "SiglipModel", dtype="bf16"),
    "timm of another size": Form(
        "timm vit", TRANSFORMERS, *DUAL, more={"image_tower": TIMM | {"image_size": 64}}
    ),
    "timm in float16": Form("timm vit", CLIP, *DUAL, dtype="float16"),
    "router in bf16": Form(
        "huggingface, mean", (*OPEN_CLIP, "sentence_transformers"), dtype="bf16"
    ),
}
# columns of the guide's table
COLUMNS = {
    "its pipeline": "pipeline",
    "sentence-transformers": "sentence_transformers",
    "timm": "timm",
}
FAST = ("clip", "router")


def words(model):
    """Sentences from one word to more than the context, as every vocabulary here knows them."""
    longest = "a photo of two red circles " * 30
    texts = ["dog", "a dog", "two red circles", "a photo of a blue square", longest]
    return [*texts, "a photo of two red circles a dog", "cat"]


def keys_of(form, folder):
    if form.keys == "timm vit":
        return {"image_tower": TIMM} | form.more
    return described(form.keys, folder) | form.more


def made(name, folder, hub):
    """An export of a form, on this machine and on the Hub: what its consumers need, and what its
    embeddings are.
    """
    form = FORMS[name]
    source = folder / "source" / name
    source.mkdir(parents=True)
    model = tiny(**keys_of(form, source))
    # As its folder may be called.
    place = folder / f"{name}, v1.0 é"
    int8 = Int8(pairs_of(source), 4) if "onnx_int8" in form.consumers else None
    export(model, place, dtype=form.dtype, onnx="onnx" in form.consumers, int8=int8)
    if "huggingface" not in form.keys:
        assert not places(place, folder)

    repository = f"someone/{name.replace(', ', '-').replace(' ', '-')}"
    push(place, repository, endpoint=hub.url, say=lambda line: None)
    # Whatever the folder is called, the card there is of the repository.
    card = hub.repos[repository]["README.md"].decode()
    assert "local-dir" not in card and "this folder's path" not in card

    description = {
        "name": name,
        "folder": str(place),
        "repository": repository,
        "subfolder": form.subfolder,
        "consumers": [*form.consumers, "card"],
        "kind": form.kind,
        "timm_models": small_siglip.__file__ if form.keys == "siglip" else "",
    }
    given, expected = material(model, folder / f"{name}.png")
    shutil.rmtree(source)
    return description | given, expected


def pairs_of(folder):
    """Shards of eight pictures of noise, as consumers are given, with a caption each."""
    generator = np.random.default_rng(7)
    with ShardWriter(folder / "pairs", 8) as writer:
        for i in range(8):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            shown = png(Image.fromarray(pixels))
            writer.add(f"k{i}", shown, "png", [f"a photo of {i} red circles"], {})
    return str(folder / "pairs")


def material(model, file):
    """What consumers are given, the picture `file` among it, and what the model makes of that."""
    image, texts, labels = noise(model), words(model), ["cat", "two red circles"]
    image.save(file)
    pixels, _ = inputs(model, rows=7)
    ids = text.build(model.text_spec)(texts)
    given = {
        "picture": str(file),
        "texts": texts,
        "labels": labels,
        "pixels": model.pixels(pixels).tolist(),
        "ids": ids.tolist(),
        "embed_dim": model.embed_dim,
        "length": model.text_spec.context_length,
        "timm": model.open_clip_config["vision_cfg"].get("timm_model_name"),
    }

    encoder = models.from_model(model)
    with torch.no_grad():
        features = model(pixels, ids)
    weights = model.open_clip_state_dict()
    expected = {
        "image": encoder.encode_images([image]),
        "text": encoder.encode_texts(texts),
        "labels": encoder.encode_texts(labels),
        "pixels": features.image,
        "ids": features.text,
        "scale": features.scale.item(),
        "bias": None if features.bias is None else features.bias.item(),
        "weights": {name: ["F32", list(value.shape)] for name, value in weights.items()},
    }
    return given, expected


@pytest.fixture(scope="module")
def hub():
    with pytest.MonkeyPatch.context() as patched, loopback_hub() as running:
        patched.setenv("HF_TOKEN", TOKEN)
        patched.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield running


@pytest.fixture(scope="module")
def exports(tmp_path_factory, hub):
    """(description, expected) of a form by its name, made when it is first asked for."""
    folder, kept = tmp_path_factory.mktemp("consumers"), {}

    def get(name):
        if name not in kept:
            kept[name] = made(name, folder, hub)
        return kept[name]

    return get


def loaded(descriptions, names, hub, folder):
    """The records of consumers in a process of their own."""
    material = folder / "material.json"
    material.write_text(json.dumps(descriptions))
    Image.new("RGB", (40, 30), "red").save(Path(descriptions[0]["folder"]).parent / "photo.jpg")
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "empty"),
        "HF_HUB_DISABLE_XET": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-S", str(SCRIPT), str(PACKAGES), str(material), *names]
    ran = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=800
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.strip().splitlines()[-1])


def apart(rows, expected):
    return (torch.tensor(rows) - expected).abs().max().item()


def check(record, expected, form):
    """A consumer's record is the model's, within what its dtype leaves."""
    consumer = record["consumer"]
    if consumer == "pipeline":
        logits = expected["scale"] * expected["image"] @ expected["labels"].T
        scores = logits[0].softmax(dim=-1)
        if form.kind == "SiglipModel":
            scores = torch.sigmoid(logits[0] + (expected["bias"] or 0))
        tolerance = {"float32": 1e-4, "float16": 1e-2, "bf16": 5e-2}[form.dtype]
        torch.testing.assert_close(torch.tensor(record["scores"]), scores, rtol=tolerance, atol=0)
        return

    if consumer == "onnx_int8":
        for side, whole in (("image", "pixels"), ("text", "ids")):
            rows = torch.tensor(record[side])
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
            cosines = torch.cosine_similarity(rows, expected[whole])
            assert LEAST_COSINE < cosines.min() < 1 - 1e-7, f"{side}: {cosines}"
            assert record[f"{side} bytes"] < 0.45 * record[f"{side} bytes of float32"]
        return

    if consumer == "onnx":
        for n_rows in (1, 3, 7):
            assert apart(record[f"image {n_rows}"], expected["pixels"][:n_rows]) <= form.tolerance
            assert apart(record[f"text {n_rows}"], expected["ids"][:n_rows]) <= form.tolerance
        # Padding changes nothing.
        assert apart(record["text, shorter"], expected["ids"][:3]) <= form.tolerance
        return

    if consumer == "timm":
        assert apart(record["image"], expected["pixels"]) <= form.tolerance
        return
    if consumer == "transformers":
        dtype = {"bf16": "bfloat16"}.get(form.dtype, form.dtype)
        assert (record["kind"], record["dtype"]) == (form.kind, f"torch.{dtype}")
    if consumer in OPEN_CLIP:  # whatever the dtype, it stays in float32
        assert record["scale"] == pytest.approx(expected["scale"], rel=1e-5)
    assert apart(record["image"], expected["image"]) <= form.tolerance, record
    assert apart(record["text"], expected["text"]) <= form.tolerance, record


def walk(names, consumers, exports, hub, folder):
    """Compare every consumer's embeddings of every form; how many records there were."""
    both = [exports(name) for name in names]
    expected = {description["name"]: rows for description, rows in both}
    records = loaded([description for description, _ in both], consumers, hub, folder)
    errors = [record["error"] for record in records if "error" in record]
    assert not errors, "\n".join(errors)
    for record in records:
        form = FORMS[record["export"]]
        if record["consumer"] == "card":
            # A block a library, and one about pictures.
            loaders = {"open_clip_folder", "transformers", "sentence_transformers"}
            assert record["blocks"] >= 1 + len(loaders & set(form.consumers))
        elif record["consumer"] == "safetensors":
            check_files(record["files"], expected[record["export"]]["weights"])
        else:
            check(record, expected[record["export"]], form)
    loaders = [[*FORMS[name].consumers, "card"] for name in names]
    assert len(records) == sum(len(set(consumers) & set(known)) for known in loaders)
    return len(records)


def check_files(files, weights):
    """The tensors of both files are float32, and open_clip's bear its names and shapes."""
    assert set(files) == {"open_clip_model.safetensors", "model.safetensors"}
    for tensors in files.values():
        assert {dtype for dtype, _ in tensors.values()} == {"F32"}
    assert files["open_clip_model.safetensors"] == weights


LIBRARIES = {
    "open_clip": (*OPEN_CLIP, "timm"),
    "transformers": ("transformers", "pipeline"),
    "sentence-transformers": ("sentence_transformers",),
    "cards": ("card",),
}


def test_exports_load_where_vlp_is_not(exports, hub, tmp_path):
    """A sample, with one process for all libraries; the rest is slow."""
    consumers = [name for names in LIBRARIES.values() for name in names if name != "card"]
    assert walk(FAST, consumers, exports, hub, tmp_path) == 9


def test_arrays_need_no_pytorch(exports, hub, tmp_path):
    assert walk(["clip"], ARRAYS, exports, hub, tmp_path) == 3


def test_the_guide_says_who_loads_what():
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    head, _, *body = rows
    assert head == ["towers", "open_clip", "transformers", *list(COLUMNS)]

    expected = {}
    for form in FORMS.values():
        answers = ["yes" if name in form.consumers else "no" for name in COLUMNS.values()]
        assert not form.row or set(OPEN_CLIP) <= set(form.consumers)
        expected[form.row] = ["yes", f"`{form.kind}`" if form.kind else "no", *answers]
    del expected[""]
    # Its export is tried in tests/models/test_coca.py.
    expected["CoCa: attentional pool, class token, text decoder"] = [
        "yes, decoder included",
        *["no"] * 4,
    ]
    assert {name: answers for name, *answers in body} == expected and len(body) == 9


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_export_loads_with_each_library_alone(library, exports, hub, tmp_path):
    assert walk(list(FORMS), LIBRARIES[library], exports, hub, tmp_path) >= 12
