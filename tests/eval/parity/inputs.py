"""The models and the sets on which two libraries are compared; the same bytes every time.

model/, siglip/        open_clip models with random weights, one of them squashing pictures
zeroshot/, retrieval/, multilabel/, probe/     clip_benchmark's layout, of real photos
sugarcrepe/, winoground/                       the published layouts

They are made to tell: classes of unequal size and one without a picture, one to five captions a
picture, captions that are cut, photos of every shape.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.eval import material
from vlp.eval.embed import Context
from vlp.eval.pictures import Contents

CLASSES = (
    "airplanes",
    "motorbikes",
    "faces",
    "watch",
    "leopards",
    "bonsai",
    "car_side",
    "ketch",
    "chandelier",
    "hawksbill",
)
ABSENT = "crab"  # a class without a picture, among the others
N_CAPTIONED = 61  # photos with captions: an odd number, see open_clip.declared
TEMPLATES = ["a photo of a {c}.", "a drawing of the {c}", "{c}"]

VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT | {"context_length": 77}}
SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "vision_cfg": VIT | {"pool_type": "avg", "no_ln_pre": True},
    "text_cfg": TEXT | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
}
SQUASHED = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def build(root: Path) -> None:
    """Write everything below `root`."""
    # Of random models those that find something: a score of nothing would agree with anything.
    write_model(root / "model", CLIP, {}, seed=1)
    write_model(root / "siglip", SIGLIP, SQUASHED, seed=10)
    photos = _photos("test")[::5]
    classes = [*CLASSES[:4], ABSENT, *CLASSES[4:]]
    numbered = [(picture, classes.index(name)) for picture, name in photos]
    material.clip_benchmark_set(root / "zeroshot", numbered, classes=classes, templates=TEMPLATES)
    material.clip_benchmark_set(
        root / "multilabel",
        [(picture, _several(i, label)) for i, (picture, label) in enumerate(numbered)],
        classes=classes[:6],
        templates=TEMPLATES,
        kind="multilabel",
    )
    _probe(root / "probe")
    material.clip_benchmark_set(root / "retrieval", captioned(), kind="retrieval")
    _sugarcrepe(root / "sugarcrepe")
    _winoground(root / "winoground")


def context(root: Path) -> Context:
    """How our tasks run: each picture is embedded once."""
    return Context(workers=1, cache=root / "embeddings", contents=Contents())


# --- models ---------------------------------------------------------------------------------------


def write_model(
    folder: Path, model_cfg: dict[str, Any], preprocess: dict[str, Any], seed: int = 0
) -> None:
    """A folder in open_clip's form of a model with random weights."""
    kind = open_clip.CustomTextCLIP if model_cfg.get("custom_text") else open_clip.CLIP
    model = kind(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    fill(model, seed)

    folder.mkdir(parents=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    described = {"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS | preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(described))


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every weight a value that depends on its place alone, far from where it begins: a norm
    of ones and a bias of zeros would hide that it is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(noise * value.shape[-1] ** -0.5)
            elif name.endswith(("weight", "gamma")):
                value.copy_(1 + 0.1 * noise)
            elif value.ndim == 1:
                value.copy_(0.1 * noise)
            elif name == "logit_scale":
                value.copy_(3.1 + 0.1 * noise)

        for name, value in model.named_buffers():
            if name.endswith("running_mean"):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            if name.endswith("running_var"):
                value.copy_(1 + 0.2 * torch.randn(value.shape, generator=generator).abs())


# --- sets -----------------------------------------------------------------------------------------


@lru_cache
def _photos(split: str) -> list[tuple[bytes, str]]:
    """Photos of CLASSES with their class."""
    rows = [
        row
        for row in material.read_jsonl(material.shared("caltech101.jsonl"))
        if row["class"] in CLASSES and row["split"] == split
    ]
    pictures = material.members_of(material.shared("caltech101.tar"), [r["image"] for r in rows])
    return [(pictures[row["image"]], row["class"]) for row in rows]


def _several(place: int, label: int) -> np.ndarray:
    """Several labels of a picture, of six: its class and some others."""
    return np.array([label == c or place % (c + 2) == 0 for c in range(6)]).astype(int)


def _probe(folder: Path) -> None:
    """Splits to learn from, to choose by and to be tested on."""
    parts = {
        "train": _photos("train")[::12],
        "val": _photos("train")[1::24],
        "test": _photos("test")[1::6],
    }
    for split, photos in parts.items():
        numbered = [(picture, CLASSES.index(name)) for picture, name in photos]
        material.clip_benchmark_set(
            folder, numbered, split=split, classes=list(CLASSES), templates=TEMPLATES
        )


@lru_cache
def _captioned_rows() -> list[dict[str, Any]]:
    return material.read_jsonl(material.shared("coco_open.jsonl"))[:N_CAPTIONED]


@lru_cache
def _captioned_photos() -> dict[str, bytes]:
    """The photos with captions by their names."""
    names = [row["image"] for row in _captioned_rows()]
    return material.members_of(material.shared("coco_open.tar"), names)


def captioned() -> list[tuple[bytes, list[str]]]:
    """Photos with one to five captions, some of them longer than any context."""
    samples = []
    for place, row in enumerate(_captioned_rows()):
        captions = row["captions"][: 1 + place % 5]
        if place % 7 == 0:
            captions = [*captions[:-1], " ".join([captions[-1]] * 9)]
        samples.append((_captioned_photos()[row["image"]], captions))
    return samples


def _sugarcrepe(folder: Path) -> None:
    """The seven published files, of the items whose photo is here, and val2017/."""
    photos = _captioned_photos()
    (folder / "val2017").mkdir(parents=True)
    for member, photo in photos.items():
        (folder / "val2017" / Path(member).name).write_bytes(photo)

    items: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in material.read_jsonl(material.shared("sugarcrepe_open.jsonl")):
        if row["image"] not in photos:
            continue
        of_subset = items[row["subset"]]
        kept = {key: row[key] for key in ("caption", "negative_caption")}
        of_subset[str(2 * len(of_subset))] = kept | {"filename": Path(row["image"]).name}
    for subset, of_subset in items.items():
        (folder / f"{subset}.json").write_text(json.dumps(of_subset))


def _winoground(folder: Path) -> None:
    """Pairs of photos and a caption of each, as the hub's repository has them."""
    (folder / "images").mkdir(parents=True)
    examples = []
    for number, pair in enumerate(pairs()):
        example: dict[str, Any] = {"id": number}
        for side, (picture, caption) in enumerate(pair):
            name = f"ex_{number}_img_{side}"
            Image.open(io.BytesIO(picture)).convert("RGB").save(folder / "images" / f"{name}.png")
            example |= {f"image_{side}": name, f"caption_{side}": caption}
        examples.append(example)
    lines = [json.dumps(example) for example in examples]
    (folder / "examples.jsonl").write_text("\n".join(lines) + "\n")


def pairs() -> Iterator[tuple[tuple[bytes, str], tuple[bytes, str]]]:
    """Two neighbouring photos of classes, each with a sentence about it."""
    photos = _photos("test")[::17]
    for number, (first, second) in enumerate(zip(photos[::2], photos[1::2])):
        yield (
            (first[0], f"the {first[1]} of {number}"),
            (second[0], f"of {number} the {second[1]}"),
        )
