"""The same model for other needs: weights of half the size, or pictures of another size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vlp.export.place import ExportError, save_weights, write_json
from vlp.export.sentence_form import ROUTER
from vlp.models import language
from vlp.models.build import from_description
from vlp.models.dual_encoder import DualEncoder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bf16": torch.bfloat16}
# ln 100 is 4.59375 in bfloat16: as scalars they cost nothing, and stay as they are.
_WIDE = ("logit_scale", "logit_bias")


def known(name: str) -> torch.dtype:
    """The dtype of `--dtype`; ExportError for another name."""
    if name not in DTYPES:
        raise ExportError(f"dtype is {name!r}; expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def rounded(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Float32 weights with the values that they have in `dtype`; ExportError where one has none."""
    if dtype == torch.float32:
        return weights
    result = dict(weights)
    for name, value in weights.items():
        if not value.is_floating_point() or name.endswith(_WIDE):
            continue
        result[name] = value.to(dtype).float()
        if not result[name].isfinite().all():
            raise ExportError(
                f"{name} holds {value.abs().max():.4g}, which {dtype} has no number for; write "
                "--dtype bf16, or float32"
            )
    return result


def narrow(folder: Path, dtype: torch.dtype) -> None:
    """Store the weights of every form in `folder` as `dtype`, and say so in transformers' files."""
    if dtype == torch.float32:
        return
    for path in folder.rglob("*.safetensors"):
        weights = {
            name: value.to(dtype)
            if value.is_floating_point() and not name.endswith(_WIDE)
            else value
            for name, value in load_file(path).items()
        }
        save_weights(weights, path)

        # transformers computes in the dtype that the configuration states. In the Router it must
        # be float32, as sentence-transformers' own layers behind it are.
        computed = "float32" if ROUTER in path.parts else str(dtype).removeprefix("torch.")
        config = path.parent / "config.json"
        if path.name == "model.safetensors" and config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            if "model_type" in settings:
                write_json(config, _stating(settings, computed))


def _stating(settings: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration of transformers, and those inside it, with their dtype."""
    stated = {
        name: _stating(value, dtype) if isinstance(value, dict) and "model_type" in value else value
        for name, value in settings.items()
    }
    return stated | {"dtype": dtype}


@torch.no_grad()
def note(model: DualEncoder, reference: DualEncoder, dtype: torch.dtype) -> list[str]:
    """A line on how far the rounded weights are from the model's; none for float32."""
    if dtype == torch.float32:
        return []
    pixels, ids = model.example(8)
    if language.reference_of(model.open_clip_config["text_cfg"]):
        # Its language model may be absent, or large: rows in the place of what it would give.
        ids = torch.randn(8, model.text.width)
    device = next(model.parameters()).device
    ours, theirs = model(pixels.to(device), ids.to(device)), reference(pixels, ids)
    cosines = [
        (rows.cpu() * others).sum(-1).min().item()
        for rows, others in ((ours.image, theirs.image), (ours.text, theirs.text))
    ]
    return [
        f"weights: {str(dtype).removeprefix('torch.')} in every file of safetensors, scale and "
        f"bias in float32; the least cosine with float32's embeddings is {min(cosines):.6f}"
    ]


def resized(model: DualEncoder, size: int) -> DualEncoder:
    """The model for pictures of `size` × `size` pixels, as training at that size builds it
    (vlp.pretrained.image_size); ExportError for a size that the tower cannot read names others.
    """
    described = copy.deepcopy(model.description())
    described["model_cfg"]["vision_cfg"]["image_size"] = size
    described["vlp"]["heads"] = {"nonnegative": model.heads_config.nonnegative}
    trained_as = {"model_cfg": model.open_clip_config}

    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_weights({k: v.cpu() for k, v in model.open_clip_state_dict().items()}, file)
        try:
            return from_description(described, file, stated=trained_as).eval()
        except ValueError as error:
            raise ExportError(f"--image-size {size}: {error}") from error
