"""Loads exports as their users do, in a process that cannot import vlp, and prints what they give.

    python -I -S consumers.py PACKAGES MATERIAL CONSUMER…

PACKAGES is the folder of installed packages. MATERIAL is a JSON list of exports: each names its
folder, what to give it (texts, a picture of the size that it reads, the same as arrays) and who
loads it. Printed is a JSON list, a record for each consumer of each export.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import sys
import traceback
from pathlib import Path

CONSUMERS = {}


def consumer(function):
    """Enter a function export → record by its name."""
    CONSUMERS[function.__name__] = function
    return function


class WithoutVlp(importlib.abc.MetaPathFinder):
    """Refuses vlp, wherever it may lie."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vlp", "tests"):
            raise ModuleNotFoundError(f"no {name} for those who load an export", name=name)


def prepare(packages):
    """Let this process import installed packages, and nothing of ours."""
    # The flag -S leaves out .pth files, by which a checkout is installed.
    sys.path.append(packages)
    sys.meta_path.insert(0, WithoutVlp())
    try:
        import vlp  # noqa: F401
    except ModuleNotFoundError:
        return
    raise AssertionError("vlp is here")


def embedded(image, text, **more):
    """A record of unit rows, as lists of numbers."""
    import torch

    rows = [
        torch.nn.functional.normalize(torch.as_tensor(side).float(), dim=-1)
        for side in (image, text)
    ]
    return {"image": rows[0].tolist(), "text": rows[1].tolist()} | more


def picture_of(export):
    from PIL import Image

    return Image.open(export["picture"]).convert("RGB")


# --- open_clip and timm ---------------------------------------------------------------------------


def _open_clip(reference, export):
    import open_clip
    import torch

    model, preprocess = open_clip.create_model_from_pretrained(reference)
    tokenizer = open_clip.get_tokenizer(reference)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(preprocess(picture_of(export)).unsqueeze(0))
        text = model.encode_text(tokenizer(export["texts"]))
    return embedded(image, text, scale=model.logit_scale.exp().item())


@consumer
def open_clip_folder(export):
    return _open_clip(f"local-dir:{export['folder']}", export)


@consumer
def open_clip_hub(export):
    return _open_clip(f"hf-hub:{export['repository']}", export)


@consumer
def timm(export):
    """The image tower alone, out of the weights that bear timm's names."""
    import timm
    import torch
    from safetensors.torch import load_file

    weights = load_file(Path(export["folder"]) / "open_clip_model.safetensors")
    prefix = "visual.trunk."
    trunk = {
        name.removeprefix(prefix): value.float()
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    # As timm's own repositories: without its classifier where open_clip projects.
    n_outputs = 0 if "visual.head.proj.weight" in weights else export["embed_dim"]
    model = timm.create_model(export["timm"], num_classes=n_outputs).eval()
    model.load_state_dict(trunk)

    pixels = torch.tensor(export["pixels"])
    with torch.no_grad():
        rows = model(pixels)
    if not n_outputs:
        rows = rows @ weights["visual.head.proj.weight"].float().T
    return embedded(rows, rows)


# --- transformers ---------------------------------------------------------------------------------


@consumer
def transformers(export):
    import torch
    from transformers import AutoModel, AutoProcessor

    place = Path(export["folder"]) / export["subfolder"]
    model = AutoModel.from_pretrained(place).eval()
    processor = AutoProcessor.from_pretrained(place)
    inputs = processor(
        text=export["texts"],
        images=picture_of(export),
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = model(**inputs)
    dtype = str(next(model.parameters()).dtype)
    name = type(model).__name__
    return embedded(output.image_embeds, output.text_embeds, dtype=dtype, kind=name)


@consumer
def pipeline(export):
    """transformers' own way from a picture and names of classes to probabilities."""
    from transformers import pipeline

    place = Path(export["folder"]) / export["subfolder"]
    classify = pipeline("zero-shot-image-classification", model=str(place))
    if export["length"] != 64 and export["kind"] == "SiglipModel":
        padded = {"padding": "max_length", "max_length": export["length"], "truncation": True}
        classify._preprocess_params["tokenizer_kwargs"] = padded
    labels = export["labels"]
    answers = classify(picture_of(export), candidate_labels=labels, hypothesis_template="{}")
    scores = {answer["label"]: answer["score"] for answer in answers}
    return {"scores": [scores[label] for label in labels]}


@consumer
def sentence_transformers(export):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(export["folder"]), device="cpu", local_files_only=True)
    image = model.encode([picture_of(export)])
    text = model.encode(export["texts"])
    return embedded(image, text)


# --- without PyTorch ------------------------------------------------------------------------------


@consumer
def onnx(export):
    """onnxruntime and numpy alone, at numbers of rows that no tracing saw."""
    import numpy
    import onnxruntime

    rows = {}
    for side, name in (("image", "pixel_values"), ("text", "input_ids")):
        path = Path(export["folder"]) / "onnx" / f"{side}.onnx"
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        dtype = numpy.float32 if side == "image" else numpy.int64
        inputs = numpy.array(export[{"image": "pixels", "text": "ids"}[side]], dtype)
        for n_rows in (1, 3, 7):
            (embeddings,) = session.run([f"{side}_embeds"], {name: inputs[:n_rows]})
            rows[f"{side} {n_rows}"] = embeddings.tolist()
        if side == "text":
            shorter = inputs[:3, : inputs.shape[1] // 2]
            (embeddings,) = session.run(["text_embeds"], {name: shorter})
            rows["text, shorter"] = embeddings.tolist()
    assert "torch" not in sys.modules
    return rows


@consumer
def onnx_int8(export):
    """The 8-bit files by onnxruntime and numpy alone, all rows at once and one by one."""
    import numpy
    import onnxruntime

    record = {}
    for side, name, key in (("image", "pixel_values", "pixels"), ("text", "input_ids", "ids")):
        whole = Path(export["folder"]) / "onnx" / f"{side}.onnx"
        path = whole.with_name(f"{side}.int8.onnx")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        inputs = numpy.array(export[key], numpy.float32 if side == "image" else numpy.int64)
        (rows,) = session.run([f"{side}_embeds"], {name: inputs})
        (first,) = session.run([f"{side}_embeds"], {name: inputs[:1]})
        assert numpy.abs(first[0] - rows[0]).max() < 1e-3
        record[side] = rows.tolist()
        record[f"{side} bytes"] = path.stat().st_size
        record[f"{side} bytes of float32"] = whole.stat().st_size
    assert "torch" not in sys.modules
    return record


@consumer
def safetensors(export):
    """Shapes and dtypes of every file of weights, read without a library of models."""
    from safetensors import safe_open

    files = {}
    folder = Path(export["folder"])
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            names = file.keys()
            slices = {name: file.get_slice(name) for name in names}
            files[path.relative_to(folder).as_posix()] = {
                name: [part.get_dtype(), part.get_shape()] for name, part in slices.items()
            }
    assert "torch" not in sys.modules
    return {"files": files}


@consumer
def card(export):
    """Every block of the card's Python that is not vlp's, where the folder lies."""
    import os
    import re

    os.chdir(Path(export["folder"]).parent)
    text = (Path(export["folder"]) / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    others = [block for block in blocks if "from vlp" not in block]
    for block in others:
        exec(compile(block, "README.md", "exec"), {})
    return {"blocks": len(others)}


def main(packages, material, *names):
    prepare(packages)
    records = []
    for export in json.loads(Path(material).read_text(encoding="utf-8")):
        # timm learns the names that a test made up.
        if export["timm_models"]:
            file = Path(export["timm_models"])
            sys.path.append(str(file.parent))
            importlib.import_module(file.stem).register_small_siglip()

        for name in names:
            if name not in export["consumers"]:
                continue
            # One that fails must not hide what the others do.
            try:
                record = CONSUMERS[name](export)
            except Exception:
                record = {"error": traceback.format_exc()}
            records.append({"export": export["name"], "consumer": name} | record)
    print(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
